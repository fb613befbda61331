import dataclasses
from importlib import resources

import jax.numpy as jnp
import numpy as np
import pytest

from paged_kernels import AttentionSpec, HeadParams, KVPages, RaggedBatch
from paged_kernels._src.attention.block_sizes import BlockSizes
from paged_kernels._src.attention.tpu.fit import make_config
from paged_kernels._src.attention.tpu.sizes import q_rows_for, with_kv_pages
from paged_kernels._src.call import Call
from paged_kernels._src.tpu.chip import CHIPS, SMALLEST
from paged_kernels._src.tpu.tuning import lookup as tuning
from paged_kernels._src.tpu.tuning.lookup import Entry, Shape, entries, lookup

NAMED = [(chip, entry) for chip in CHIPS for entry in entries(chip.name)]
"""Every shipped entry, with its chip."""
SHAPE = Shape(mode="decode", q_per_kv=4, kv_heads=2, head_dim=128, page_size=16, kv_dtype="bfloat16")
LINE = {
    "shape": dataclasses.asdict(SHAPE),
    "block_sizes": {"q_rows": 1, "kv_pages": 8},
    "cost": 20.0,
    "default_cost": 25.0,
    "how": "estimated",
    "workload": "decode-8-2-128-p16-c8192",
    "jax": "0.10.2",
    "libtpu": "0.0.52",
    "date": "2026-11-23",
}


def config_of(chip, shape, block_sizes=None, pages_per_seq=512):
    """Returns the config of the kernel for a call of this shape."""
    rows = 1 if shape.mode == "decode" else 4096
    batch = RaggedBatch(
        page_table=jnp.zeros((1, pages_per_seq), jnp.int32),
        kv_lens=jnp.ones(1, jnp.int32),
        cu_q_lens=jnp.array([0, 1], jnp.int32),
        num_seqs=jnp.int32(1),
        max_q_len=1 if shape.mode == "decode" else None,
    )
    pages = KVPages.shapes(2, shape.page_size, shape.kv_heads, shape.head_dim, shape.kv_dtype)
    q = np.broadcast_to(jnp.zeros((), jnp.bfloat16), (rows, shape.q_per_kv * shape.kv_heads, shape.head_dim))
    call = Call.of_attention(q, pages, batch, AttentionSpec(), HeadParams()).attention
    return make_config(call, block_sizes=block_sizes, chip=chip)


@pytest.fixture
def tuned(monkeypatch):
    """An entry for `SHAPE` on every chip."""
    entry = Entry.from_json(LINE)
    monkeypatch.setattr(tuning, "entries", lambda chip: (entry,))
    return entry


def test_every_file_belongs_to_a_chip():
    files = {file.name for file in resources.files("paged_kernels._src.tpu.tuning").joinpath("data").iterdir()}
    assert files <= {f"{chip.name}.json" for chip in CHIPS}


@pytest.mark.parametrize(("chip", "entry"), NAMED, ids=[f"{chip.name}-{entry.workload}" for chip, entry in NAMED])
def test_every_entry_is_what_the_kernel_is_compiled_with(chip, entry):
    assert lookup(chip.name, entry.shape) == entry.block_sizes
    config = config_of(chip, entry.shape)
    max_q_len = 1 if entry.shape.mode == "decode" else None
    assert config.q_rows == q_rows_for(config.tokens, max_q_len, entry.block_sizes.q_rows)
    assert config == with_kv_pages(config, entry.block_sizes.kv_pages)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_a_shape_has_one_entry_no_worse_than_the_default(chip):
    shapes = [entry.shape for entry in entries(chip.name)]
    assert len(shapes) == len(set(shapes))
    assert all(0 < entry.cost <= entry.default_cost for entry in entries(chip.name))


def test_a_tuned_shape_takes_its_entry(tuned):
    assert config_of(SMALLEST, SHAPE).kv_pages == 8
    assert config_of(SMALLEST, SHAPE, pages_per_seq=4).kv_pages == 4


def test_the_callers_block_sizes_come_before_the_entry(tuned):
    assert config_of(SMALLEST, SHAPE, BlockSizes(q_rows=1, kv_pages=2)).kv_pages == 2


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "prefill"},
        {"q_per_kv": 8},
        {"kv_heads": 1},
        {"head_dim": 64},
        {"page_size": 32},
        {"kv_dtype": "float32"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_shapes_fall_to_the_heuristic(tuned, monkeypatch, change):
    other = dataclasses.replace(SHAPE, **change)
    assert lookup("v6e", other) is None
    with_entry = config_of(SMALLEST, other)
    monkeypatch.setattr(tuning, "entries", lambda chip: ())
    assert config_of(SMALLEST, other) == with_entry


def test_a_chip_without_a_file_has_no_entries():
    assert entries("v0") == ()
    assert lookup("v0", SHAPE) is None


def test_a_line_that_is_not_whole_is_refused():
    with pytest.raises(TypeError, match="libtpu"):
        Entry.from_json({key: value for key, value in LINE.items() if key != "libtpu"})
    with pytest.raises(ValueError, match="kv_pages=0 must be at least 1"):
        Entry.from_json({**LINE, "block_sizes": {"q_rows": 1, "kv_pages": 0}})
