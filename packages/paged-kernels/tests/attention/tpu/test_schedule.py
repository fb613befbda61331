"""The schedule against a plain Python loop over rows, blocks and keys."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from kernel_data import SPECS, WORKLOADS, make_case, token_places

from paged_kernels import AttentionSpec, RaggedBatch
from paged_kernels._src.attention.mask import visible
from paged_kernels._src.attention.tpu.schedule import Tiles, make_tiles, max_tiles, page_block_starts


def tiles_by_hand(workload, spec, q_rows):
    """`(block, seq, kv_len, row_lo, row_hi, position, first_page, end_page)` of each tile, in row order."""
    tiles = []
    for block in range(-(-workload.tokens // q_rows)):
        for seq, start in token_places(workload):
            kv_len, q_len = workload.kv_lens[seq], workload.q_lens[seq]
            rows = [r for r in range(start, start + q_len) if r // q_rows == block]
            if not rows:
                continue
            positions = [kv_len - q_len + r - start for r in rows]
            seen = [p for p in range(kv_len) if any(visible(spec, t, p, kv_len) for t in positions)]
            lo, hi = rows[0] - block * q_rows, rows[-1] - block * q_rows + 1
            first, end = seen[0] // workload.page_size, seen[-1] // workload.page_size + 1
            tiles.append((block, seq, kv_len, lo, hi, positions[0] - lo, first, end))
    return tiles


def tiles_made(tiles: Tiles):
    starts = np.asarray(tiles.block_starts)
    fields = (tiles.seq, tiles.kv_len, tiles.row_lo, tiles.row_hi, tiles.position, tiles.first_page, tiles.end_page)
    blocks = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return [(int(block), *(int(f[i]) for f in fields)) for i, block in enumerate(blocks)]


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("q_rows", [1, 16])
@pytest.mark.parametrize("spec", ["plain", "window", "bidirectional", "bidirectional_window"])
def test_tiles_equal_those_made_by_hand(workload, q_rows, spec):
    workload, spec = WORKLOADS[workload], SPECS[spec]
    batch = make_case(workload).batch
    tiles = make_tiles(batch, spec, tokens=workload.tokens, q_rows=q_rows, page_size=workload.page_size)
    assert tiles_made(tiles) == tiles_by_hand(workload, spec, q_rows)
    assert len(tiles.seq) == max_tiles(workload.tokens, workload.seqs, q_rows) + 1
    assert int(tiles.end_page[-1]) == 0  # the last entry is never in use


def test_rows_before_position_zero_have_no_tile():
    batch = RaggedBatch.from_lists([[1]], kv_lens=[3], q_lens=[5])
    tiles = make_tiles(batch, AttentionSpec(), tokens=8, q_rows=4, page_size=16)
    assert tiles_made(tiles) == [(0, 0, 3, 2, 4, -2, 0, 1), (1, 0, 3, 0, 1, 2, 0, 1)]


def test_a_length_beyond_the_table_is_cut():
    batch = RaggedBatch.from_lists([[1, 2]], kv_lens=[99], q_lens=[1])
    tiles = make_tiles(batch, AttentionSpec(), tokens=1, q_rows=1, page_size=16)
    assert int(tiles.end_page[0]) == 2


@pytest.mark.parametrize(
    ("q_start", "spec", "pages"),
    [
        (10, AttentionSpec(), (0, 1)),
        (31, AttentionSpec(), (0, 3)),
        (-9, AttentionSpec(), (0, 1)),
        (-9, AttentionSpec(causal=False), (0, 3)),
        (60, AttentionSpec(sliding_window=30), (1, 3)),
        (90, AttentionSpec(sliding_window=30), (2, 3)),
    ],
    ids=["inside", "across_pages", "after_the_rows", "all", "window", "before_the_window"],
)
def test_part_of_a_context(q_start, spec, pages):
    """Two rows over a part of 40 keys. If they see no key, their tile has one page."""
    batch = RaggedBatch.from_lists([[1, 2, 3, 0]], kv_lens=[40], q_lens=[2])
    batch = dataclasses.replace(batch, q_starts=jnp.array([q_start], jnp.int32))
    tiles = make_tiles(batch, spec, tokens=2, q_rows=16, page_size=16)
    assert tiles_made(tiles) == [(0, 0, 40, 0, 2, q_start, *pages)]


def test_tree_rows_need_the_pages_of_all_new_tokens():
    batch = RaggedBatch.from_lists([[1, 2, 3]], kv_lens=[33], q_lens=[3])
    tree = jnp.zeros((3, 1), jnp.int32)
    tiles = make_tiles(dataclasses.replace(batch, tree_mask=tree), AttentionSpec(), tokens=3, q_rows=1, page_size=16)
    assert [(tile[-3], tile[-1]) for tile in tiles_made(tiles)] == [(30, 3), (31, 3), (32, 3)]
    assert tiles.first_new.tolist() == [30, 30, 30, 0]


def test_blocks_of_subblocks_belong_to_one_block_of_rows():
    batch = RaggedBatch.from_lists([[1] * 5, [1], [1] * 2, [1] * 9, [1]], [80, 3, 0, 130, 16], [1] * 5, max_q_len=1)
    tiles = make_tiles(batch, AttentionSpec(), tokens=6, q_rows=2, page_size=16)
    assert tiles.block_end[:4].tolist() == [2, 2, 3, 4]
    # Sub-blocks of at most 2 pages: 3 and 1 in the first two rows, then 5 (the gap has none), then 1.
    assert page_block_starts(tiles, subblock_pages=2, subblocks=4).tolist() == [0, 1, 3, 4]
