"""The TPU kernel, interpreted at its strictest, against dense attention in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # its result on races is not public
from jax.sharding import PartitionSpec as P
from kernel_data import (
    FEATURES,
    SPECS,
    WORKLOADS,
    Workload,
    assert_equals_oracle,
    assert_lse_close,
    assert_rows_close,
    attend_densely,
    decode,
    make_case,
)

from paged_kernels import AttentionSpec, HeadParams, KVPages, RaggedBatch, get_backend, paged_attention
from paged_kernels._src.attention.block_sizes import BlockSizes
from paged_kernels._src.call import Call
from paged_kernels._src.tpu.interpreter import INTERPRET

SMALL = BlockSizes(q_rows=16, kv_pages=2)
EAGER = dataclasses.replace(INTERPRET, dma_execution_mode="eager")


@functools.partial(jax.jit, static_argnames=("spec", "block_sizes", "interpret", "return_lse"))
def kernel(q, pages, batch, spec, head_params, *, block_sizes=SMALL, interpret=INTERPRET, return_lse=True):
    """The interpreted kernel, prepared and called as `paged_attention` does it."""
    backend = dataclasses.replace(get_backend("tpu_interpret"), block_sizes=block_sizes, interpret=interpret)
    fitted = backend.fit(Call.of_attention(q, pages, batch, spec, head_params))
    return backend.attend(q, pages, fitted.prepare(batch), head_params, return_lse=return_lse)


def slow(*values):
    """A case for the slow session only: ordinary runs test its features in other combinations."""
    return pytest.param(*values, marks=pytest.mark.slow)


def check(workload, spec, dtype, block_sizes=SMALL, interpret=INTERPRET):
    case = make_case(workload, spec=spec, dtype=dtype)
    out, lse = kernel(case.q, case.pages, case.batch, spec, HeadParams(), block_sizes=block_sizes, interpret=interpret)
    expected, expected_lse = attend_densely(case, spec)
    assert (out.dtype, lse.dtype) == (case.q.dtype, jnp.float32)
    assert_rows_close(out, expected, dtype)
    assert_lse_close(lse, expected_lse, dtype)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_workloads_in_float32(workload):
    check(WORKLOADS[workload], SPECS["plain"], "float32")


@pytest.mark.parametrize("workload", ["decode", "mixed", "gaps", "wide_group", slow("head_128"), slow("large_pages")])
def test_workloads_in_bfloat16(workload):
    check(WORKLOADS[workload], SPECS["plain"], "bfloat16")


@pytest.mark.parametrize(
    ("workload", "spec"),
    [
        slow("mixed", "scale"),  # "everything" has it with a cap and a window
        slow("mixed", "cap"),
        slow("mixed", "window"),  # `test_block_sizes_change_nothing` has it, in decode too
        slow("decode", "window"),
        ("mixed", "window_of_one"),
        slow("mixed", "window_of_a_page"),  # a test below has a window that ends where a block begins
        slow("mixed", "bidirectional"),  # with a window below, without one in `test_api.py`
        ("mixed", "bidirectional_window"),
        ("mixed", "everything"),
        ("decode", "everything"),
    ],
)
def test_specs(workload, spec):
    check(WORKLOADS[workload], SPECS[spec], "float32")


OTHER_SHAPES = {
    "decode_head_128": Workload(kv_lens=(40, 3), q_lens=(1, 1), tokens=3, head_dim=128, max_q_len=1),
    "group_of_3": Workload(kv_lens=(40, 12), q_lens=(1, 12), tokens=16, q_heads=9, kv_heads=3),
    "head_80": Workload(kv_lens=(29, 34), q_lens=(11, 1), tokens=16, head_dim=80),
    "decode_head_192": Workload(kv_lens=(29, 34), q_lens=(1, 1), tokens=3, head_dim=192, max_q_len=1),
    "decode_large_pages": Workload(
        kv_lens=(70,), q_lens=(1,), tokens=2, page_size=64, pages_per_seq=2, num_pages=8, max_q_len=1
    ),
}


@pytest.mark.parametrize(
    ("workload", "dtype"),
    [
        ("decode_head_128", "bfloat16"),
        ("group_of_3", "float32"),
        slow("head_80", "float32"),  # `test_api.py` has both head sizes
        slow("decode_head_192", "bfloat16"),
        ("decode_large_pages", "float32"),
        slow("decode_head_128", "float32"),
        slow("group_of_3", "bfloat16"),
        slow("head_80", "bfloat16"),
        slow("decode_head_192", "float32"),
        slow("decode_large_pages", "bfloat16"),
    ],
)
def test_other_shapes(workload, dtype):
    check(OTHER_SHAPES[workload], SPECS["everything"], dtype)


@pytest.mark.slow  # ordinary runs test one of each workload in `test_api.py`
@pytest.mark.parametrize("workload", FEATURES)
def test_features(workload):
    spec = SPECS["plain" if workload in ("latent", "page_2", "part_of_context") else "everything"]
    assert_equals_oracle(make_case(FEATURES[workload], spec=spec), spec, backend="tpu_interpret", block_sizes=SMALL)


@pytest.mark.parametrize(
    ("workload", "heads", "spec"),
    [
        ("mixed", "both", "everything"),
        ("decode", "sinks", "window_of_one"),
        slow("decode", "alibi", "bidirectional"),
        slow("wide_group", "both", "plain"),
        ("gaps", "sinks", "plain"),
    ],
)
def test_parameters_of_the_heads(workload, heads, spec):
    case = make_case(WORKLOADS[workload], spec=SPECS[spec], heads=heads)
    assert_equals_oracle(case, SPECS[spec], backend="tpu_interpret", block_sizes=SMALL)


@pytest.mark.parametrize(
    ("workload", "dtype", "kv_dtype"),
    [
        slow("mixed", "float32", "int8"),  # `test_api.py` has other head sizes and trees of this type
        slow("decode", "bfloat16", "int8"),  # `test_api.py` has decode of this and the next type
        slow("decode_mqa", "float32", "float8_e4m3fn"),
        ("mixed", "bfloat16", "float8_e5m2"),
        slow("large_pages", "float32", "float8_e5m2"),
        ("decode", "float32", "int4"),
        ("head_80", "bfloat16", "int4"),
        ("latent", "float32", "int8"),
        slow("page_2", "float32", "int4"),  # `test_api.py` has it
        slow("page_4", "float32", "int8"),
    ],
)
def test_pages_with_scales(workload, dtype, kv_dtype):
    case = make_case({**WORKLOADS, **FEATURES}[workload], spec=SPECS["window"], dtype=dtype, kv_dtype=kv_dtype)
    assert_equals_oracle(case, SPECS["window"], backend="tpu_interpret", block_sizes=SMALL)


@pytest.mark.parametrize(
    ("workload", "block_sizes"),
    [
        ("decode", BlockSizes(q_rows=1, kv_pages=1)),
        ("decode", None),
        ("mixed", BlockSizes(q_rows=999, kv_pages=3)),
        slow("mixed", None),  # `test_api.py` runs other workloads with these
    ],
)
def test_block_sizes_change_nothing(workload, block_sizes):
    check(WORKLOADS[workload], SPECS["window"], "float32", block_sizes)


ONE_SEQUENCE = {"q_heads": 2, "kv_heads": 1, "seqs": 1, "pages_per_seq": 8}


@pytest.mark.parametrize(
    "workload",
    [
        decode(113, tokens=1, **ONE_SEQUENCE),
        Workload(kv_lens=(113,), q_lens=(9,), tokens=9, **ONE_SEQUENCE),
    ],
    ids=["decode", "prefill"],
)
def test_a_block_may_begin_with_the_last_key_before_the_window(workload):
    """The last row, at 112, sees keys from 17 on: all but one of the first block, keys 16 to 31."""
    check(workload, AttentionSpec(sliding_window=96), "float32", BlockSizes(q_rows=16, kv_pages=1))


@pytest.mark.parametrize(("q_dtype", "kv_dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_queries_and_pages_of_different_types(q_dtype, kv_dtype):
    case = make_case(WORKLOADS["mixed"], dtype="bfloat16")
    pages = KVPages.from_kv(case.pages.k, case.pages.v, kv_dtype)
    out, _ = kernel(case.q.astype(q_dtype), pages, case.batch, SPECS["plain"], HeadParams())
    assert_rows_close(out, attend_densely(case, SPECS["plain"])[0], q_dtype)


@pytest.mark.parametrize("workload", ["decode", "mixed"])
def test_no_copy_is_read_early_or_overwritten(workload):
    """Each buffer has its own semaphore. So no wait is satisfied by the copy of another."""
    check(
        WORKLOADS[workload],
        SPECS["plain"],
        "float32",
        SMALL,
        dataclasses.replace(INTERPRET, detect_races=True),
    )
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
def test_infinities_stay_with_their_sequence(dtype):
    """In each buffer, a full block comes before one that is not full. What it left there must not be multiplied."""
    case = make_case(decode(64, 20, 5, 64, 40, 3, q_heads=2, kv_heads=1), dtype=dtype)
    first = case.batch.page_table[0, :4]
    pages = dataclasses.replace(case.pages, data=case.pages.data.at[first].set(jnp.inf))
    out, lse = kernel(case.q, pages, case.batch, SPECS["plain"], HeadParams(), return_lse=False)
    assert lse is None
    assert_rows_close(out[1:], attend_densely(case, SPECS["plain"])[0][1:], dtype)


def test_copies_may_arrive_at_once():
    check(WORKLOADS["mixed"], SPECS["plain"], "float32", interpret=EAGER)


def test_runs_where_64_bit_types_are_on():
    case = make_case(WORKLOADS["decode"])
    with jax.enable_x64(True):
        out, _ = kernel(case.q, case.pages, case.batch, SPECS["plain"], HeadParams())
    assert out.dtype == jnp.float32
    assert_rows_close(out, attend_densely(case, SPECS["plain"])[0], "float32")


def test_more_than_128_pages_a_sequence():
    """The page ids of one block come from a later 128 ids of the page table, and from two of them at once."""
    workload = Workload(
        kv_lens=(130 * 16 + 5, 20), q_lens=(1, 1), tokens=2, q_heads=1, kv_heads=1, pages_per_seq=131, num_pages=140,
        max_q_len=1,
    )  # fmt: skip
    check(workload, AttentionSpec(), "float32", BlockSizes(q_rows=1, kv_pages=64))


def test_four_shards_equal_one():
    case = make_case(WORKLOADS["mixed"])
    heads = 4
    data = jnp.tile(case.pages.data, (1, heads // 2, 1, 1))
    q = jnp.tile(case.q, (1, 2, 1))
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))

    def attend(q, pages, batch):
        return kernel(q, pages, batch, SPECS["plain"], HeadParams(), return_lse=False)[0]

    specs = (P(None, "tp"), KVPages.partition_spec("tp"), P())
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=P(None, "tp"), check_vma=False)
    expected = np.tile(attend_densely(case, SPECS["plain"])[0], (1, 2, 1))
    assert_rows_close(jax.jit(sharded)(q, dataclasses.replace(case.pages, data=data), case.batch), expected, "float32")


def shapes(dtype="bfloat16", q_dtype="bfloat16"):
    batch = RaggedBatch.from_lists([[1]], kv_lens=[1], q_lens=[1])
    pages = KVPages.zeros(4, 16, 2, 64, dtype)
    return jnp.zeros((1, 4, 64), q_dtype), pages, batch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, r"pages has dtype float16; the TPU kernel has float32 and bfloat16"),
        ({"q_dtype": "float16"}, r"q has dtype float16; the TPU kernel has float32 and bfloat16"),
    ],
)
def test_what_the_kernel_does_not_have_is_refused(change, message):
    with pytest.raises(NotImplementedError, match=message):
        paged_attention(*shapes(**change), AttentionSpec(), backend="tpu_interpret")


def test_blocks_too_large_are_refused_before_compiling():
    backend = get_backend("tpu_interpret").with_block_sizes(q_rows=16, kv_pages=10**6)
    q, pages, batch = shapes()
    wide = dataclasses.replace(batch, page_table=jnp.ones((1, 10**6), jnp.int32))
    with pytest.raises(NotImplementedError, match="MiB of VMEM"):
        paged_attention(q, pages, wide, AttentionSpec(), backend=backend)
