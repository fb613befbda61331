"""Write and attention compile for TPU through the operator and through a model, by the kernels, with pages in place.

The kernels by themselves are compiled for every TPU generation by layer 1's tests; here it is what lies above them:
the platform, the mesh and the backend are found, and each chip has its own heads.
"""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from paged_attn_layer import AttentionMetadata, Decoder, PagedAttn, read_config
from paged_attn_layer._src.models import llama
from paged_cache import PagedAttentionCache, PagedAttentionCacheView
from paged_kernels import KVPages, RaggedBatch

pytestmark = pytest.mark.aot

SEQS, PAGES_PER_SEQ, NUM_PAGES, PAGE_SIZE, Q_HEADS, KV_HEADS, HEAD_DIM = 16, 64, 512, 16, 32, 8, 128
STEPS = {"decode": (SEQS, 1), "mixed": (128, None)}
KERNELS = {"decode": 2, "mixed": 3}  # the write, the attention, and in a mixed step that of sequences of one row
PAGES = KVPages.shapes(NUM_PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM)
PAGES_BYTES = 2 * NUM_PAGES * PAGE_SIZE * KV_HEADS * 2 * HEAD_DIM

forward = jax.jit(lambda impl, *args: impl(*args), static_argnums=0, donate_argnums=4)


def array(shape, sharding, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def batch_on(sharding, max_q_len):
    shapes = {"page_table": (SEQS, PAGES_PER_SEQ), "kv_lens": (SEQS,), "cu_q_lens": (SEQS + 1,), "num_seqs": ()}
    arrays = {name: array(shape, sharding, jnp.int32) for name, shape in shapes.items()}
    return RaggedBatch(**arrays, max_q_len=max_q_len)


def arguments(mode, rows, pages, everywhere, view_mesh=None):
    """q, k, v, view and batch, each with its sharding."""
    tokens, max_q_len = STEPS[mode]
    q, k, v = (array((tokens, heads, HEAD_DIM), rows) for heads in (Q_HEADS, KV_HEADS, KV_HEADS))
    head_axis = None if view_mesh is None else "tp"
    placed = jax.tree.map(lambda leaf: array(leaf.shape, pages, leaf.dtype), PAGES)
    view = PagedAttentionCacheView(placed, view_mesh, head_axis)
    return q, k, v, view, batch_on(everywhere, max_q_len)


def on_mesh(mode, mesh, view_mesh=None):
    heads, pages, everywhere = (
        NamedSharding(mesh, spec) for spec in (P(None, "tp"), KVPages.partition_spec("tp"), P())
    )
    return arguments(mode, heads, pages, everywhere, view_mesh)


def check(lowered, pages_bytes, kernels):
    """Compiles it; all of its write and attention are kernels, and the pages are updated where they lie."""
    assert lowered.as_text().count("@tpu_custom_call") == kernels
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes == pages_bytes
    assert memory.temp_size_in_bytes < pages_bytes


@pytest.mark.parametrize("mode", STEPS)
@pytest.mark.parametrize("found", ["view", "metadata", "context"])
def test_the_operator_on_four_chips_wherever_the_mesh_comes_from(mesh, mode, found):
    impl = PagedAttn(AttentionMetadata(mesh=mesh if found == "metadata" else None))
    args = on_mesh(mode, mesh, mesh if found == "view" else None)
    with jax.set_mesh(mesh) if found == "context" else contextlib.nullcontext():
        check(forward.lower(impl, *args), PAGES_BYTES // 4, KERNELS[mode])


@pytest.mark.parametrize("mode", STEPS)
def test_the_operator_on_one_chip(mesh, mode):
    chip = mesh.devices.flat[0]
    with jax.default_device(chip):
        args = arguments(mode, *[SingleDeviceSharding(chip)] * 3)
        check(forward.lower(PagedAttn(), *args), PAGES_BYTES, KERNELS[mode])


def test_pages_alone_are_written_by_the_kernel(mesh):
    """`view.write` picks the backend of the view's mesh, not that of the host."""
    _, k, v, view, batch = on_mesh("decode", mesh, mesh)
    write = jax.jit(lambda view, *new: view.write(*new), donate_argnums=0)
    check(write.lower(view, k, v, batch), PAGES_BYTES // 4, kernels=1)


@pytest.mark.parametrize("mode", STEPS)
def test_a_model_on_four_chips(mesh, mode):
    config = read_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 1024,
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": 2,
            "num_attention_heads": Q_HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
        }
    )
    model = nnx.eval_shape(lambda: Decoder(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)

    def placed(path, weight):
        spec = llama.FAMILY.partition_spec(".".join(map(str, path)), config, mesh)
        return weight.replace(array(weight.shape, NamedSharding(mesh, spec)))

    weights = nnx.map_state(placed, state)
    everywhere = NamedSharding(mesh, P())
    *_, view, batch = on_mesh(mode, mesh, mesh)
    tokens, _ = STEPS[mode]
    ids, rows = array((tokens,), everywhere, jnp.int32), array((SEQS,), everywhere, jnp.int32)

    def step(weights, cache, ids, batch, rows):
        return nnx.merge(graph, weights)(ids, ids, cache, (batch,), rows)

    lowered = jax.jit(step, donate_argnums=1).lower(weights, PagedAttentionCache((view, view)), ids, batch, rows)
    check(lowered, 2 * PAGES_BYTES // 4, KERNELS[mode])  # the layers share one lowered function
