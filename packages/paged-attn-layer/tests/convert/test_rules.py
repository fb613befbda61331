import dataclasses

import numpy as np
import pytest

from paged_attn_layer._src.convert.rules import LLAMA_RULES, plan
from paged_attn_layer._src.convert.source import ConversionError


@dataclasses.dataclass
class Source:
    shapes: dict
    problems: list = dataclasses.field(default_factory=list)
    where: str = "somewhere"
    config: dict = dataclasses.field(default_factory=dict)

    def read(self, name):
        raise AssertionError(f"{name} was read while planning")


TARGETS = {"norm.scale": (4,), "layers.10.mlp.up_proj.kernel": (4, 6)}
SHAPES = {"model.norm.weight": (4,), "model.layers.10.mlp.up_proj.weight": (6, 4)}


def planned(shapes, problems=(), *, tied=False):
    return plan(Source(shapes, list(problems)), TARGETS, LLAMA_RULES, tied=tied)


def problems_of(shapes, problems=()):
    with pytest.raises(ConversionError) as caught:
        planned(shapes, problems)
    return caught.value


def test_every_weight_finds_its_place():
    fillings = planned(SHAPES)
    assert {path: filling.name for path, filling in fillings.items()} == {
        "norm.scale": "model.norm.weight",
        "layers.10.mlp.up_proj.kernel": "model.layers.10.mlp.up_proj.weight",
    }
    assert fillings["layers.10.mlp.up_proj.kernel"].transform(np.zeros((6, 4))).shape == (4, 6)


def test_what_is_not_needed_is_left():
    planned({**SHAPES, "model.layers.0.self_attn.rotary_emb.inv_freq": (2,)})
    planned({**SHAPES, "lm_head.weight": (9, 4)}, tied=True)
    assert "lm_head.weight (9, 4) has no place" in str(problems_of({**SHAPES, "lm_head.weight": (9, 4)}))


def test_all_problems_are_in_one_error():
    shapes = {"model.layers.10.mlp.up_proj.weight": (6, 5), "model.norm.weight_scale": (), "extra.bias": (3,)}
    error = problems_of(shapes, ["a.safetensors is corrupt"])
    assert error.problems == (
        "a.safetensors is corrupt",
        "model.layers.10.mlp.up_proj.weight (6, 5) becomes layers.10.mlp.up_proj.kernel (5, 6), which must be (4, 6); "
        "is config.json this checkpoint's own?",
        "model.norm.weight_scale () has no place in the model; is config.json this checkpoint's own?",
        "extra.bias (3,) has no place in the model; is config.json this checkpoint's own?",
        "norm.scale (4,) of the model is filled by no weight; the checkpoint is not complete",
    )
    assert str(error).startswith("somewhere cannot be converted; nothing was loaded:\n  - a.safetensors is corrupt\n")


def test_a_weight_in_an_unreadable_shard_is_one_problem():
    error = problems_of({**SHAPES, "model.norm.weight": None}, ["b.safetensors is missing"])
    assert error.problems == ("b.safetensors is missing",)


def test_where_nothing_can_be_read_the_files_problems_are_all_there_is_to_say():
    assert problems_of({}, ["model.safetensors is corrupt"]).problems == ("model.safetensors is corrupt",)
