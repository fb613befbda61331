"""The work list, as integers."""

import jax.numpy as jnp
import numpy as np
import pytest

from paged_kernels import AttentionSpec, RaggedBatch
from paged_kernels._src.attention.xla.work_list import make_work_list


def tiles_of(kv_lens, q_lens, *, q_rows=4, page_size=4, single_rows=False, num_seqs=None, **spec):
    pages = [[1] * -(-n // page_size) for n in kv_lens]
    batch = RaggedBatch.from_lists(pages, kv_lens, q_lens)
    if num_seqs is not None:
        batch = RaggedBatch(**{**vars(batch), "num_seqs": jnp.int32(num_seqs)})
    tiles, count = make_work_list(
        batch, AttentionSpec(**spec), tokens=sum(q_lens), page_size=page_size, q_rows=q_rows, single_rows=single_rows
    )
    return {name: np.asarray(field)[: int(count)].tolist() for name, field in vars(tiles).items()}, tiles, int(count)


def test_tiles_cut_each_sequence_on_its_own():
    fields, _, _ = tiles_of([10, 6, 20], [10, 1, 5])
    assert fields == {
        "seq": [0, 0, 0, 2, 2],
        "first_row": [0, 4, 8, 11, 15],
        "num_rows": [4, 4, 2, 4, 1],
        "position": [0, 4, 8, 15, 19],
        "first_page": [0, 0, 0, 0, 0],
        "kv_end": [4, 8, 10, 19, 20],
    }


def test_single_rows_are_listed_apart():
    fields, _, _ = tiles_of([10, 6, 20, 3], [10, 1, 5, 1], q_rows=1, single_rows=True)
    assert (fields["seq"], fields["first_row"], fields["kv_end"]) == ([1, 3], [10, 16], [6, 3])


def test_gaps_empty_sequences_and_unused_entries_have_no_tiles():
    fields, _, _ = tiles_of([10, 0, 20, 7, 9], [3, 4, 0, 2, 2], num_seqs=4)
    assert (fields["seq"], fields["first_row"]) == ([0, 3], [0, 7])


@pytest.mark.parametrize(
    ("window", "first_page"),
    [(1, 4), (3, 4), (4, 3), (7, 3), (8, 2), (18, 0), (100, 0)],  # the row is at 18, in slot 2 of page 4
)
def test_pages_before_the_window_are_not_listed(window, first_page):
    fields, _, _ = tiles_of([19], [1], q_rows=1, single_rows=True, sliding_window=window)
    assert (fields["first_page"], fields["kv_end"]) == ([first_page], [19])


def test_without_causality_all_keys_are_listed():
    fields, _, _ = tiles_of([10], [10], causal=False)
    assert fields["kv_end"] == [10, 10, 10]


@pytest.mark.parametrize("kv_pages", [1, 2, 3, 8])
def test_blocks_are_in_proportion_to_the_keys(kv_pages):
    _, tiles, count = tiles_of([40, 3, 17, 21], [1, 1, 1, 1], q_rows=1, single_rows=True)
    blocks = np.asarray(tiles.num_blocks(4, kv_pages))[:count]
    assert blocks.tolist() == [-(-pages // kv_pages) for pages in (10, 1, 5, 6)]


def test_causal_tiles_walk_half_of_the_square():
    _, tiles, count = tiles_of([64], [64])
    assert np.asarray(tiles.num_blocks(4, 1))[:count].sum() == 16 * 17 / 2


def test_a_window_costs_what_it_spans():
    _, short, _ = tiles_of([100], [1], q_rows=1, single_rows=True, sliding_window=8)
    _, long, _ = tiles_of([10000], [1], q_rows=1, single_rows=True, sliding_window=8)
    assert short.num_blocks(4, 1)[0] == long.num_blocks(4, 1)[0] == 2


def test_lengths_beyond_the_table_stop_at_its_end():
    batch = RaggedBatch(
        page_table=jnp.ones((1, 2), jnp.int32),
        kv_lens=jnp.array([99], jnp.int32),
        cu_q_lens=jnp.array([0, 1], jnp.int32),
        num_seqs=jnp.int32(1),
    )
    tiles, _ = make_work_list(batch, AttentionSpec(), tokens=1, page_size=4, q_rows=1, single_rows=True)
    assert tiles.kv_end.tolist() == [8]


@pytest.mark.parametrize("single_rows", [False, True])
@pytest.mark.parametrize(
    "starts", [[0, 2**31 - 1, 0, 5], [0, 9, 0, 9], [0, 3, 2**30, 2**31 - 1], [-5, 1, -(2**31), 9], [7, 8, 9, 10]]
)
def test_traced_starts_that_are_wrong_give_no_more_tiles_than_the_rows_have(starts, single_rows):
    batch = RaggedBatch(
        page_table=jnp.ones((3, 2), jnp.int32),
        kv_lens=jnp.full(3, 8, jnp.int32),
        cu_q_lens=jnp.array(starts, jnp.int32),
        num_seqs=jnp.int32(3),
    )
    q_rows = 1 if single_rows else 4
    tiles, count = make_work_list(batch, AttentionSpec(), tokens=9, page_size=4, q_rows=q_rows, single_rows=single_rows)
    assert int(count) <= len(tiles.seq) <= 9
    assert (np.asarray(tiles.first_row)[: int(count)] >= 0).all()
    assert (np.asarray(tiles.first_row + tiles.num_rows)[: int(count)] <= 9).all()


def test_rows_past_the_end_are_not_listed():
    batch = RaggedBatch.from_lists([[1, 2, 3]], kv_lens=[12], q_lens=[12])
    tiles, count = make_work_list(batch, AttentionSpec(), tokens=6, page_size=4, q_rows=4, single_rows=False)
    assert int(count) == 2
    assert (tiles.first_row.tolist()[:2], tiles.num_rows.tolist()[:2], tiles.position.tolist()[:2]) == (
        [0, 4],
        [4, 2],
        [0, 4],
    )
