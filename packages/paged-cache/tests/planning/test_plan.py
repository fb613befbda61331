import dataclasses

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from paged_cache import CacheConfig, CacheSpec, KVShape, PagedAttentionCache
from paged_cache._src.cache.config import bytes_per_page
from paged_cache._src.manager import LayerGroup, OutOfPages, PageManager
from paged_cache.planning import plan

GIB = 2**30
LLAMA_3_8B = CacheSpec.uniform(32, KVShape(num_kv_heads=8, head_dim=128))
DEEPSEEK_V3 = CacheSpec.uniform(61, KVShape(num_kv_heads=1, head_dim=576, v_head_dim=512, latent=True))
GEMMA_3_27B = CacheSpec.of_layers(
    (LayerGroup.window(1024) if (layer + 1) % 6 else LayerGroup.full(), KVShape(num_kv_heads=16, head_dim=128))
    for layer in range(62)
)


def tiny(full=None, **shape):
    """Three layers with a window and two that see all; these may have another shape."""
    kv = KVShape(**{"num_kv_heads": 4, "head_dim": 8} | shape)
    return CacheSpec(groups=(LayerGroup.window(8, (0, 1, 2), kv), LayerGroup.full((3, 4), full or kv)))


TINY = tiny()
TWO_SHAPES = tiny(full=KVShape(num_kv_heads=2, head_dim=16, dtype="float32"))
DTYPES = ("float32", "float16", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2", "int4")

forgetting = st.builds(LayerGroup.window, st.integers(1, 20)) | st.builds(LayerGroup.chunked, st.integers(1, 20))
groups = st.just(LayerGroup.full()) | forgetting


@st.composite
def shapes(draw):
    """Models of up to three ways of seeing, with one to three layers each."""
    seen = draw(st.lists(groups, min_size=1, max_size=3, unique=True))
    counts = [draw(st.integers(1, 3)) for _ in seen]
    starts = [sum(counts[:index]) for index in range(len(counts))]
    kv = KVShape(num_kv_heads=1, head_dim=8)
    layered = tuple(
        dataclasses.replace(group, layers=tuple(range(start, start + count)), kv=kv)
        for group, start, count in zip(seen, starts, counts, strict=True)
    )
    return CacheSpec(groups=layered)


@st.composite
def plans(draw):
    """A plan of a few pages."""
    shape, page_size, chunk = draw(shapes()), draw(st.integers(1, 8)), draw(st.integers(1, 20))
    page = plan(shape, GIB, page_size=page_size, dtype="float32").bytes_per_page
    return plan(shape, draw(st.integers(2, 120)) * page, page_size=page_size, dtype="float32", chunk=chunk)


def test_llama_3_8b():
    fits = plan(LLAMA_3_8B, 16 * GIB, page_size=16)
    assert fits.bytes_per_token == 131072
    assert fits.padding_bytes_per_token == 0
    assert fits.num_pages == 8192
    assert fits.num_tokens == fits.longest_sequence == 8191 * 16  # page 0 is the null page
    assert [fits.sequences(context) for context in (2048, 8192, 32768, 131072)] == [63, 15, 3, 0]


def test_deepseek_v3_pads_its_latent_rows():
    fits = plan(DEEPSEEK_V3, GIB)
    assert fits.bytes_per_token == 61 * 640 * 2  # 576 numbers in five registers of 128 lanes
    assert fits.number_bytes_per_token == 61 * 576 * 2


def test_gemma_3_27b_keeps_little_in_its_windows():
    fits = plan(GEMMA_3_27B, 64 * GIB, chunk=1)
    assert len(fits.groups) == 7  # ten layers each; the last has two
    assert len(fits.views) == 10
    assert fits.bytes_per_token == 70 * 16 * 256 * 2
    assert fits.padding_bytes_per_token == 8 * 16 * 256 * 2
    assert fits.pages_of(32768, 1) == 2048 + 6 * 65


def test_scales_and_what_pads_them():
    fits = plan(LLAMA_3_8B, GIB, page_size=16, dtype="int8")
    rows = 32 * 8
    assert fits.number_bytes_per_token == rows * 256
    assert fits.scale_bytes_per_token == rows * 2 * 4
    assert fits.padding_bytes_per_token == rows * (128 - 32) * 4 / 16  # lanes of the scales of a page of 16
    assert plan(LLAMA_3_8B, GIB, page_size=64, dtype="int8").padding_bytes_per_token == 0


def test_a_number_of_int4_is_half_a_byte():
    assert plan(LLAMA_3_8B, GIB, dtype="int4").number_bytes_per_token == 32 * 8 * 128


@pytest.mark.parametrize(("tensor_parallel", "heads"), [(1, 8), (2, 4), (8, 1), (3, 8), (16, 8)])
def test_heads_are_split_or_replicated(tensor_parallel, heads):
    fits = plan(LLAMA_3_8B, GIB, tensor_parallel=tensor_parallel)
    assert {shape.num_kv_heads for shape in fits.views} == {heads}
    assert fits.bytes_per_token == 131072 * heads / 8


@pytest.mark.parametrize("tensor_parallel", [1, 2, 3, 4])
@pytest.mark.parametrize("spec", [TINY, TWO_SHAPES], ids=["one shape", "two shapes"])
def test_is_what_cache_config_creates(spec, tensor_parallel):
    mesh = jax.make_mesh((tensor_parallel,), ("tp",), axis_types=(AxisType.Auto,))
    budget = 1_000_000
    fits = plan(spec, budget, page_size=16, tensor_parallel=tensor_parallel)
    made = CacheConfig.for_spec(
        spec, mesh, max_seqs=4, max_sequence_length=70, page_size=16, byte_budget=budget, dtype="bfloat16"
    )
    assert fits.cache_config(max_seqs=4, max_sequence_length=70) == made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "spec", [TINY, TWO_SHAPES, tiny(num_kv_heads=1, v_head_dim=4, latent=True)], ids=["tiny", "two shapes", "latent"]
)
def test_is_what_the_cache_allocates(spec, dtype):
    fits = plan(spec, 100_000, page_size=4, dtype=dtype)
    cache = PagedAttentionCache.init_cache(None, None, fits.cache_config(max_seqs=2, max_sequence_length=16), None)
    allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert allocated == fits.num_pages * fits.bytes_per_page
    assert allocated <= fits.memory_bytes < allocated + fits.bytes_per_page


def test_a_page_takes_room_in_the_views_of_every_shape():
    fits = plan(TWO_SHAPES, 10**6, page_size=16)
    assert [len(group.layers) for group in fits.groups] == [2, 1, 2]
    small, large = 16 * 4 * 128 * 2, 16 * 2 * 128 * 4  # tokens, heads, lanes of an entry, bytes
    assert fits.bytes_per_page == 2 * small + 2 * large
    assert fits.bytes_per_token == 3 * fits.bytes_per_page / 16
    assert fits.number_bytes_per_token == 3 * 4 * 16 * 2 + 2 * 2 * 32 * 4
    assert fits.padding_bytes_per_token == fits.bytes_per_token - fits.number_bytes_per_token


@given(shape=shapes(), pages=st.integers(2, 200), more=st.integers(0, 100_000), context=st.integers(1, 200))
def test_more_memory_never_holds_less(shape, pages, more, context):
    memory = pages * plan(shape, GIB).bytes_per_page
    less, larger = plan(shape, memory), plan(shape, memory + more)
    assert less.num_pages <= larger.num_pages
    assert less.num_tokens <= larger.num_tokens
    assert less.longest_sequence <= larger.longest_sequence
    assert less.sequences(context) <= larger.sequences(context)


@given(made=plans(), context=st.integers(1, 60), more=st.integers(0, 60))
def test_longer_sequences_are_never_more(made, context, more):
    assert made.sequences(context) >= made.sequences(context + more)
    assert (made.sequences(context) > 0) == (context <= made.longest_sequence)


def manager_of(made, context, max_seqs):
    return PageManager(
        made.num_pages, made.page_size, max_seqs=max_seqs, max_sequence_length=context, groups=made.groups
    )


def admit_in_chunks(manager, seq, prompt, chunk):
    """A new sequence with `prompt` tokens, all computed; no other starts with `seq`."""
    tokens = [seq, *range(1, prompt)]
    seq = manager.admit(tokens, chunk=chunk)
    while True:
        length = manager.lengths(seq)[0]
        manager.commit(seq, length - manager.computed(seq)[0])
        if length == prompt:
            return seq
        more = tokens[length : length + chunk]
        manager.extend(seq, len(more), more)


@settings(max_examples=100)
@given(made=plans(), count=st.integers(1, 5), data=st.data())
def test_as_many_sequences_are_admitted_and_decode(made, count, data):
    context = data.draw(st.integers(1, 60))
    prompt = data.draw(st.integers(1, context))
    pages = made.pages_of(context, made.chunk) + (count - 1) * made.pages_of(context, 1)
    made = dataclasses.replace(made, memory_bytes=(1 + pages) * made.bytes_per_page)  # just enough
    assert made.sequences(context) == count
    manager = manager_of(made, context, max_seqs=count)
    seqs = [admit_in_chunks(manager, seq, prompt, made.chunk) for seq in range(count)]
    for _ in range(context - prompt):
        manager.extend(seqs)
        manager.commit(seqs, token_ids=[7] * count)
    assert all(manager.lengths(seqs) == context)


def test_one_more_is_not_admitted():
    made = plan(LLAMA_3_8B, GIB // 4, page_size=16)
    manager = manager_of(made, 300, max_seqs=20)
    for seq in range(made.sequences(300)):
        admit_in_chunks(manager, seq, 300, made.chunk)
    with pytest.raises(OutOfPages):
        admit_in_chunks(manager, 100, 300, made.chunk)


def test_windows_alone_hold_a_sequence_of_any_length():
    window = LayerGroup.window(4096, range(32), KVShape(num_kv_heads=8, head_dim=128))
    assert plan(CacheSpec(groups=(window,)), 16 * GIB).longest_sequence == 2**31 - 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_bytes": 0}, "memory_bytes=0 must be a whole number of at least 1"),
        ({"memory_bytes": 1.5}, "memory_bytes=1.5 must be a whole number"),
        ({"page_size": 0}, "page_size=0 must be"),
        ({"tensor_parallel": 0}, "tensor_parallel=0 must be"),
        ({"chunk": True}, "chunk=True must be"),
        ({"dtype": "int16"}, "dtype=int16 must be one of"),
        (
            {"memory_bytes": 4_000_000},
            "memory_bytes=4,000,000 must hold the null page and one more, which need 4,194,304",
        ),
    ],
)
def test_sizes_that_make_no_sense_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**({"spec": LLAMA_3_8B, "memory_bytes": GIB} | changes))


def test_a_context_below_one_is_named():
    with pytest.raises(ValueError, match="context=0 must be a whole number of at least 1"):
        plan(LLAMA_3_8B, GIB).sequences(0)


def test_deep_models_are_planned_by_their_shapes_not_layer_by_layer(monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        return bytes_per_page(*args)

    monkeypatch.setattr("paged_cache._src.planning.plan.bytes_per_page", counted)
    kv = KVShape(num_kv_heads=8, head_dim=128)
    deep, flat = (plan(CacheSpec.uniform(layers, kv), 16 * GIB) for layers in (5000, 1))
    assert deep.bytes_per_page == 5000 * flat.bytes_per_page
    assert (deep.bytes_per_token, deep.longest_sequence) == (
        5000 * flat.bytes_per_token,
        (16 * GIB // deep.bytes_per_page - 1) * 16,
    )
    assert len(calls) == 2
