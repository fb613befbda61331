import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import TOLERANCE
from flax import nnx
from jax.sharding import Mesh
from numpy.testing import assert_allclose

from paged_attn_layer._src.blocks.mlp import ClampedGLU, MLPConfig
from paged_attn_layer._src.blocks.moe import MoE, MoEConfig
from paged_attn_layer._src.blocks.norm import NormConfig
from paged_attn_layer._src.blocks.router import RouterConfig
from paged_cache import PagedAttentionCacheView
from paged_kernels import KVPages

EXPERT = MLPConfig(hidden_size=6, intermediate_size=10)
SHARED = MLPConfig(hidden_size=6, intermediate_size=7)
GPT_OSS = dataclasses.replace(EXPERT, use_bias=True, activation=ClampedGLU(alpha=1.5, limit=2.0))
CONFIG = MoEConfig(router=RouterConfig(num_experts=5, experts_per_token=2), expert=EXPERT)
ROWS = 2 * np.random.default_rng(0).standard_normal((19, 6)).astype(np.float32)

run = jax.jit(lambda graph, state, x: nnx.merge(graph, state)(x), static_argnums=0)


def make(**changes):
    moe, rng = MoE(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0)), np.random.default_rng(1)
    for _, weight in nnx.to_flat_state(nnx.state(moe)):
        weight[...] = jnp.asarray(rng.standard_normal(weight[...].shape), jnp.float32)
    return moe


def dense_moe(moe, rows):
    """Row by row and expert by expert, in float64."""
    choice, config, outs = moe.router(rows), moe.config, []
    weights = {name: np.asarray(weight, np.float64) for name, weight in moe.experts.weights().items()}

    def expert(e, x):
        gate, up = (x @ weights[f"{name}_proj"][e] + bias(name, e) for name in ("gate", "up"))
        if isinstance(config.expert.activation, ClampedGLU):
            gate, up = np.minimum(gate, 2), np.clip(up, -2, 2) + 1
            gate = gate / (1 + np.exp(-1.5 * gate))
        else:
            gate = gate / (1 + np.exp(-gate))
        return (gate * up) @ weights["down_proj"][e] + bias("down", e)

    def bias(name, e):
        return weights[f"{name}_bias"][e] if config.expert.use_bias else 0

    def norm(x, module):
        if module is None:
            return x
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + module.config.eps) * np.asarray(module.scale[...])

    for row, x in enumerate(rows.astype(np.float64)):
        normed = norm(x, moe.expert_norm)
        pairs = zip(choice.experts[row].tolist(), choice.weights[row].tolist(), strict=True)
        outs.append(sum(weight * expert(e, normed) for e, weight in pairs))
    outs = norm(np.stack(outs), moe.expert_post_norm)
    if config.shared is None:
        return outs
    shared = np.asarray(moe.shared(norm(rows, moe.shared_norm).astype(np.float32)))
    return outs + norm(shared, moe.shared_post_norm)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"expert": GPT_OSS},
        {"shared": SHARED},
        {"shared": SHARED, "norm": NormConfig(eps=0.1)},
        {"norm": NormConfig()},
    ],
    ids=["plain", "gpt-oss", "shared", "gemma4", "norms"],
)
def test_each_row_is_computed_by_its_experts(changes):
    moe = make(**changes)
    assert_allclose(run(*nnx.split(moe), ROWS), dense_moe(moe, ROWS), **TOLERANCE)


def test_rows_may_have_several_axes():
    moe = make()
    out = run(*nnx.split(moe), ROWS[:18].reshape(2, 9, 6))
    assert_allclose(out.reshape(18, 6), dense_moe(moe, ROWS[:18]), **TOLERANCE)


def test_an_expert_that_no_row_chooses_is_not_read():
    moe = make()
    chosen = set(np.asarray(moe.router(ROWS[:1]).experts).ravel().tolist())
    for expert in set(range(5)) - chosen:
        moe.experts.up_proj[...] = moe.experts.up_proj[...].at[expert].set(jnp.nan)
    assert np.isfinite(run(*nnx.split(moe), ROWS[:1])).all()


MESHES = {
    "1x2": ((1, 2), ("dp", "ep")),
    "2x2": ((2, 2), ("dp", "ep")),
    "ep-tp": ((2, 2), ("ep", "tp")),
    "tp": ((2,), ("tp",)),
    "not-divided": ((3,), ("ep",)),
}


def view_on(mesh):
    pages = KVPages.zeros(4, 8, 1, 8, jnp.float32)
    return PagedAttentionCacheView(pages, mesh=mesh, data_axis="dp" if "dp" in mesh.shape else None)


@pytest.mark.parametrize(("sizes", "names"), MESHES.values(), ids=MESHES)
def test_on_a_mesh_it_gives_the_same_with_one_sum(sizes, names):
    moe = make(expert=GPT_OSS, norm=NormConfig(), router=dataclasses.replace(CONFIG.router, num_experts=8))
    mesh = Mesh(np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes), names)
    replicas = mesh.shape.get("dp", 1)
    x = ROWS[:18].reshape(replicas, -1, 6) if "dp" in names else ROWS[:18]
    compiled = jax.jit(moe.__call__).lower(x, view_on(mesh)).compile()
    assert_allclose(compiled(x, view_on(mesh)).reshape(18, 6), dense_moe(moe, ROWS[:18]), **TOLERANCE)
    is_split = any(moe.config.axes_on(mesh))
    assert len(re.findall(r" all-reduce(-start)?\(", compiled.as_text())) == is_split
    assert "all-gather" not in compiled.as_text()


def test_experts_over_the_data_axis_are_refused():
    moe = make(expert_axes=("dp",), router=dataclasses.replace(CONFIG.router, num_experts=8))
    mesh = Mesh(np.array(jax.devices()[:2]), ("dp",))
    with pytest.raises(NotImplementedError, match="experts split over 'dp', the data axis of the cache"):
        moe(ROWS[:18].reshape(2, 9, 6), view_on(mesh))


def test_which_axes_split_it():
    config = dataclasses.replace(CONFIG, expert_axes=("x", "y"), mlp_axes=("y",))
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("x", "y"))
    assert config.axes_on(mesh) == ((), ("y",)), "5 experts on 2 devices, 10 numbers within an expert"
    eight = dataclasses.replace(config, router=dataclasses.replace(CONFIG.router, num_experts=8))
    assert eight.axes_on(mesh) == (("x", "y"), ()), "no axis splits two axes of a weight"


def test_weights_have_the_names_and_shapes_that_checkpoints_convert_to():
    moe = make(expert=dataclasses.replace(EXPERT, use_bias=True), router=dataclasses.replace(CONFIG.router, use_bias=1))
    assert {"/".join(path): weight[...].shape for path, weight in nnx.to_flat_state(nnx.state(moe))} == {
        "router/kernel": (6, 5),
        "router/bias": (5,),
        "experts/gate_proj": (5, 6, 10),
        "experts/up_proj": (5, 6, 10),
        "experts/down_proj": (5, 10, 6),
        "experts/gate_bias": (5, 10),
        "experts/up_bias": (5, 10),
        "experts/down_bias": (5, 6),
    }


def test_sixteen_bits_stay_sixteen_bits():
    moe = MoE(CONFIG, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert moe(ROWS.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_configs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"shared\.hidden_size=8 must be expert\.hidden_size=6"):
        make(shared=MLPConfig(hidden_size=8, intermediate_size=7))
    with pytest.raises(NotImplementedError, match=r"expert\.gated=False is not supported"):
        make(expert=dataclasses.replace(EXPERT, gated=False))
    with pytest.raises(ValueError, match="needs gated=True"):
        dataclasses.replace(EXPERT, gated=False, activation=ClampedGLU(alpha=1.5, limit=2.0))
