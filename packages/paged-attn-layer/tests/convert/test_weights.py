import dataclasses

import numpy as np
import pytest

from paged_attn_layer._src.convert.operations import Concat, Split, Stack, Transpose, Unstack
from paged_attn_layer._src.convert.source import ConversionError
from paged_attn_layer._src.convert.weights import WeightRule, export_weights, linear, match_weights, rename, unused


@dataclasses.dataclass
class Source:
    shapes: dict
    problems: list = dataclasses.field(default_factory=list)
    where: str = "somewhere"
    config: dict = dataclasses.field(default_factory=dict)

    def weight(self, name):
        raise AssertionError(f"{name} was read while matching")


RULES = (
    rename("model.norm.weight", "norm.scale"),
    *linear("model.layers.{layer}.mlp.{gate|up}_proj", "layers.{layer}.mlp.{gate|up}_proj"),
    unused("model.layers.{layer}.inv_freq"),
)
TARGETS = {"norm.scale": (4,), "layers.10.mlp.up_proj.kernel": (4, 6)}
SHAPES = {"model.norm.weight": (4,), "model.layers.10.mlp.up_proj.weight": (6, 4)}


def problems_of(shapes, problems=(), targets=TARGETS, rules=RULES):
    with pytest.raises(ConversionError) as caught:
        match_weights(Source(shapes, list(problems)), targets, rules)
    return caught.value


def loaded(matches, checkpoint):
    """The model's weights by path, made as `load_model` makes them."""
    made = {}
    for match in matches:
        arrays = match.forward([checkpoint[name] for name, _ in match.sources])
        made |= zip(match.targets, arrays, strict=True)
    return made


def random_arrays(shapes):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def assert_round_trip(targets, rules, checkpoint_shapes):
    """Random weights, exported and loaded again, are the same bit for bit; the checkpoint's shapes are these."""
    weights = random_arrays(targets)
    checkpoint = {name: weight.read() for name, weight in export_weights(weights, rules)}
    shapes = {name: array.shape for name, array in checkpoint.items()}
    assert shapes == checkpoint_shapes
    again = loaded(match_weights(Source(shapes), targets, rules), checkpoint)
    assert again.keys() == weights.keys()
    for path, weight in weights.items():
        np.testing.assert_array_equal(again[path], weight)
    return weights, checkpoint


def test_every_weight_finds_its_place():
    matches = match_weights(Source(SHAPES), TARGETS, RULES)
    assert [(match.sources, match.targets) for match in matches] == [
        ((("model.norm.weight", (4,)),), ("norm.scale",)),
        ((("model.layers.10.mlp.up_proj.weight", (6, 4)),), ("layers.10.mlp.up_proj.kernel",)),
    ]
    weight = np.arange(24).reshape(6, 4)
    np.testing.assert_array_equal(matches[1].forward([weight])[0], weight.T)


def test_what_the_model_does_not_use_is_left():
    match_weights(Source({**SHAPES, "model.layers.0.inv_freq": (2,)}), TARGETS, RULES)
    tied = (*RULES, unused("lm_head.weight"))
    match_weights(Source({**SHAPES, "lm_head.weight": (9, 4)}), TARGETS, tied)
    assert "lm_head.weight (9, 4) has no place" in str(problems_of({**SHAPES, "lm_head.weight": (9, 4)}))


def test_all_problems_are_in_one_error():
    shapes = {"model.layers.10.mlp.up_proj.weight": (6, 5), "model.norm.weight_scale": (), "extra.bias": (3,)}
    error = problems_of(shapes, ["a.safetensors is corrupt"])
    assert error.problems == (
        "a.safetensors is corrupt",
        "model.norm.weight (4,) is missing: the model's norm.scale cannot be made; the checkpoint is not complete",
        "model.layers.10.mlp.up_proj.weight has shape (6, 5), which must be (6, 4) for the model's "
        "layers.10.mlp.up_proj.kernel; is config.json this checkpoint's own?",
        "model.norm.weight_scale () has no place in the model; is config.json this checkpoint's own?",
        "extra.bias (3,) has no place in the model; is config.json this checkpoint's own?",
    )
    assert str(error).startswith("somewhere cannot be converted; nothing was loaded:\n  - a.safetensors is corrupt\n")


def test_a_weight_in_an_unreadable_shard_is_one_problem():
    error = problems_of({**SHAPES, "model.norm.weight": None}, ["b.safetensors is missing"])
    assert error.problems == ("b.safetensors is missing",)


def test_where_nothing_can_be_read_the_files_problems_are_all_there_is_to_say():
    assert problems_of({}, ["model.safetensors is corrupt"]).problems == ("model.safetensors is corrupt",)


def test_a_weight_of_the_model_that_no_rule_makes():
    message = "scalar () of the model is made by no rule of its family"
    assert problems_of(SHAPES, targets={**TARGETS, "scalar": ()}).problems == (message,)
    with pytest.raises(ValueError, match=r"scalar \(\) of the model is made by no rule"):
        dict(export_weights({"scalar": np.zeros(())}, RULES))


FUSED = WeightRule(
    ("{layer}.qkv.weight",),
    ("{layer}.q.kernel", "{layer}.k.kernel", "{layer}.v.kernel"),
    (Split(0, (4, 2, 2)), Transpose()),
)
QKV = {f"{layer}.{part}.kernel": (3, size) for layer in (0, 7) for part, size in (("q", 4), ("k", 2), ("v", 2))}


def test_one_weight_becomes_three():
    weights, checkpoint = assert_round_trip(QKV, (FUSED,), {"0.qkv.weight": (8, 3), "7.qkv.weight": (8, 3)})
    np.testing.assert_array_equal(checkpoint["7.qkv.weight"][4:6], weights["7.k.kernel"].T)


def test_a_fused_weight_is_one_match():
    (match,) = match_weights(Source({"7.qkv.weight": (8, 3)}), {p: QKV[p] for p in QKV if p[0] == "7"}, (FUSED,))
    assert match.targets == ("7.q.kernel", "7.k.kernel", "7.v.kernel")
    (problem,) = problems_of({"0.qkv.weight": (8, 3)}, targets=QKV, rules=(FUSED,)).problems
    assert problem.startswith("7.qkv.weight (8, 3) is missing: the model's 7.q.kernel and 2 more cannot be made")


EXPERTS = WeightRule(
    ("{layer}.{expert}.gate", "{layer}.{expert}.up"),
    ("{layer}.gate_up",),
    (Stack(12), Concat(1, (4, 5)), Transpose()),
)


def test_many_weights_become_one():
    """Twelve experts, in order of their numbers: 10 comes after 9, not after 1."""
    shapes = {f"3.{expert}.{part}": (n, 2) for part, n in (("gate", 4), ("up", 5)) for expert in range(12)}
    weights, checkpoint = assert_round_trip({"3.gate_up": (12, 2, 9)}, (EXPERTS,), shapes)
    np.testing.assert_array_equal(checkpoint["3.10.up"], weights["3.gate_up"][10, :, 4:].T)


def test_each_missing_expert_is_named():
    shapes = {f"3.{expert}.{part}": (n, 2) for part, n in (("gate", 4), ("up", 5)) for expert in range(12)}
    del shapes["3.4.up"], shapes["3.11.gate"]
    problems = problems_of(shapes, targets={"3.gate_up": (12, 2, 9)}, rules=(EXPERTS,)).problems
    assert [problem.split(" is missing")[0] for problem in problems] == ["3.11.gate (4, 2)", "3.4.up (5, 2)"]


def test_one_weight_becomes_many():
    rule = WeightRule(("{layer}.experts",), ("{layer}.{expert}.kernel",), (Unstack(3), Transpose()))
    targets = {f"{layer}.{expert}.kernel": (2, 5) for layer in (1, 2) for expert in range(3)}
    weights, checkpoint = assert_round_trip(targets, (rule,), {"1.experts": (3, 5, 2), "2.experts": (3, 5, 2)})
    np.testing.assert_array_equal(checkpoint["2.experts"][1], weights["2.1.kernel"].T)


def test_the_checkpoint_decides_between_rules_that_make_the_same():
    apart = WeightRule(("{layer}.{q|k|v}.weight",), ("{layer}.{q|k|v}.kernel",), (Transpose(),))
    targets = {path: shape for path, shape in QKV.items() if path[0] == "0"}
    fused_shapes = {"0.qkv.weight": (8, 3)}
    apart_shapes = {"0.q.weight": (4, 3), "0.k.weight": (2, 3), "0.v.weight": (2, 3)}
    for rules in ((FUSED, apart), (apart, FUSED)):
        assert len(match_weights(Source(fused_shapes), targets, rules)) == 1
        assert len(match_weights(Source(apart_shapes), targets, rules)) == 3
    exported = {name: array.shape for name, array in export_weights(random_arrays(targets), (FUSED, apart))}
    assert exported == fused_shapes


GATE_UP = WeightRule(("gate_up",), ("{expert}.gate", "{expert}.up"), (Split(1, (2, 2)), Unstack(1)))


@pytest.mark.parametrize(
    ("rule", "targets", "message"),
    [
        (FUSED, {"0.q.kernel": (3, 4)}, r"rule that makes 0.q.kernel, .* does not fit: the model has no 0.k.kernel"),
        (GATE_UP, {"0.gate": (2, 2)}, r"rule that makes 0.gate, 0.up does not fit: the model has no 0.up"),
        (rename("a", "b", Transpose()), {"b": (3,)}, r"the rule that makes b does not fit: shape \(3,\) must have"),
        (rename("a", "b", Stack(2)), {"b": (2, 3)}, r"the rule that makes b has 1 sources; its operations need 2"),
    ],
)
def test_a_table_that_does_not_fit_the_model(rule, targets, message):
    with pytest.raises(ValueError, match=message):
        match_weights(Source({"a": (3,)}), targets, (rule,))


def test_names_of_one_side_have_the_same_placeholders():
    with pytest.raises(ValueError, match=r"\{layer\}.q, k must all have the same placeholders"):
        WeightRule(("{layer}.q", "k"), ("{layer}.qk",))
