import pytest

from paged_attn_layer._src.convert.templates import fill, parse, placeholders


@pytest.mark.parametrize(
    ("template", "name", "values"),
    [
        ("norm.weight", "norm.weight", {}),
        ("norm.weight", "normXweight", None),
        ("norm.weight", "norm.weight_scale", None),
        ("a.{layer}.b", "a.12.b", {"layer": "12"}),
        ("a.{layer}.b", "a.x.b", None),
        ("a.{layer}.b", "a.1.2.b", None),
        ("{q|kv}_proj", "kv_proj", {"q|kv": "kv"}),
        ("{q|kv}_proj", "v_proj", None),
        ("{n}.{m}.{n}", "3.4.3", {"n": "3", "m": "4"}),
        ("{n}.{m}.{n}", "3.4.4", None),
        ("{n}{n}1", "221", {"n": "2"}),
        ("layers.61.{...}", "layers.61.mlp.gate.weight", {"...": "mlp.gate.weight"}),
        ("layers.61.{...}", "layers.6.mlp.gate.weight", None),
    ],
)
def test_parse(template, name, values):
    assert parse(template, name) == values
    if values is not None:
        assert fill(template, values) == name


def test_a_placeholder_without_a_value_takes_the_index():
    assert fill("{layer}.{expert}", {"layer": "7"}, index=2) == "7.2"


def test_placeholders():
    assert placeholders("{layer}.{q|k}", "x", "{layer}") == {"layer", "q|k"}
