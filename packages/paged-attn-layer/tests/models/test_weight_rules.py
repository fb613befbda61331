import numpy as np
import pytest
from tiny_checkpoints import CONFIG

from paged_attn_layer import read_config
from paged_attn_layer._src.convert.operations import Transpose
from paged_attn_layer._src.convert.weights import WeightRule
from paged_attn_layer._src.models.weight_rules import fused_gate_up, fused_qkv, head

TINY = read_config(CONFIG)


def parts(rules, kind, rows):
    """What becomes of a fused weight or bias whose row `n` holds `n`."""
    rule = next(rule for rule in rules if rule.sources[0].endswith(kind))
    source = np.arange(rows, dtype=np.float32)
    source = np.broadcast_to(source[:, None], (rows, 3)) if kind == "weight" else source
    (match,) = rule.matches(shapes_of(rule, rows, kind))
    return {
        path.split(".", 2)[2]: array.read() for path, array in zip(match.targets, match.forward([source]), strict=True)
    }


def shapes_of(rule: WeightRule, rows, kind):
    sizes = rule.operations[0].sizes
    assert sum(sizes) == rows
    paths = [target.replace("{layer}", "0") for target in rule.targets]
    assert (Transpose() in rule.operations) == (kind == "weight")
    return {path: (3, n) if kind == "weight" else (n,) for path, n in zip(paths, sizes, strict=True)}


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_fused_queries_keys_and_values_come_in_this_order(kind):
    made = parts(fused_qkv(TINY), kind, 32)
    first = {path.split(".")[1]: array.reshape(-1, array.shape[-1])[0].tolist() for path, array in made.items()}
    assert first == {"q_proj": [*range(16)], "k_proj": [*range(16, 24)], "v_proj": [*range(24, 32)]}


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_the_gate_comes_before_the_up_projection(kind):
    made = parts(fused_gate_up(TINY), kind, 48)
    first = {path.split(".")[1]: array.reshape(-1, array.shape[-1])[0].tolist() for path, array in made.items()}
    assert first == {"gate_proj": [*range(24)], "up_proj": [*range(24, 48)]}


def test_a_tied_model_takes_the_head_if_there_is_no_embedding_and_else_ignores_it():
    tied = head(read_config({**CONFIG, "tie_word_embeddings": True}))
    assert [(rule.sources, rule.targets) for rule in tied] == [
        (("lm_head.weight",), ("embed.embedding",)),
        (("lm_head.weight",), ()),
    ]
    assert [rule.targets for rule in head(TINY)] == [("lm_head",)]
