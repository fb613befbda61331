import jax
import numpy as np
import pytest
from eformer.escale import PartitionAxis, PartitionManager
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tiny_checkpoints import CONFIG, config_of, read_tiny

from paged_attn_layer._src.models.decoder_family import with_mesh_axes
from paged_attn_layer._src.models.registry import FAMILIES, find_family, read_config
from paged_cache import HFConfig


@pytest.mark.parametrize(
    ("path", "two", "three"),
    [
        ("embed.embedding", P("tp", None), P(None, None)),  # 32 words, not divisible by 3
        ("lm_head", P("tp", None), P(None, None)),
        ("layers.1.attention.k_proj.kernel", P(None, "tp"), P(None, None)),  # 2 KV heads
        ("layers.1.attention.q_proj.bias", P("tp"), P(None)),
        ("layers.1.attention.o_proj.kernel", P("tp", None), P(None, None)),
        ("layers.1.attention.o_proj.bias", P(), P()),
        ("layers.1.mlp.up_proj.kernel", P(None, "tp"), P(None, "tp")),  # 24 is divisible by both
        ("layers.1.mlp.down_proj.kernel", P("tp", None), P("tp", None)),
        ("layers.1.mlp.down_proj.bias", P(), P()),
        ("layers.1.mlp_norm.scale", P(), P()),
    ],
)
def test_specs(path, two, three):
    family = find_family(HFConfig.of(CONFIG))
    config = read_config(CONFIG)
    for devices, want in ((2, two), (3, three)):
        assert family.partition_spec(path, config, Mesh(np.array(jax.devices()[:devices]), ("tp",))) == want


def test_a_models_experts_know_the_mesh_axes():
    config = read_tiny("qwen3_moe")
    manager = PartitionManager(PartitionAxis(expert_axis="x", head_axis="y"))
    moe = with_mesh_axes(config, manager).layers[0].mlp
    assert (moe.expert_axes, moe.mlp_axes) == (("x",), ("y",))
    assert with_mesh_axes(config, None) == config
    assert with_mesh_axes(read_tiny("llama"), manager) == read_tiny("llama")


NEVER_SPLIT = {"router", "down_bias", "q_a_proj", "kv_a_proj", "per_layer_inputs"}
"""Parts of the names of matrices of which every device needs all."""


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_types[0])
def test_every_matrix_of_a_model_is_in_its_familys_table(family):
    config = family.read_config(HFConfig.of(config_of(family, attention_bias=True, mlp_bias=True)))
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    model = nnx.eval_shape(lambda: family.build(config, param_dtype=np.float32, rngs=nnx.Rngs(0)))
    for keys, weight in nnx.to_flat_state(nnx.state(model)):
        path = ".".join(map(str, keys))
        spec = family.partition_spec(path, config, mesh)
        assert len(spec) == weight.ndim or (weight.ndim == 1 and spec == P()), path
        assert "tp" in spec or weight.ndim == 1 or NEVER_SPLIT & set(keys), path
