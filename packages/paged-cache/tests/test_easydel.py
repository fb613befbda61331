import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_cache import PagedAttentionMetadata

to_ragged_jit = jax.jit(PagedAttentionMetadata.to_ragged_batch)


def i32(*values):
    return jnp.asarray(values, jnp.int32)


def prefill(length=9, start=4, chunk=8, table=(1, 2, 3)):
    return {
        "prefill_length": jnp.int32(length),
        "prefill_position": start + jnp.arange(chunk, dtype=jnp.int32),
        "prefill_page_table": i32(*table),
    }


def decodes(positions=(6, -1, 0), table=((4, 5), (7, 7), (6, 0))):
    return {"decodes_position": i32(*positions), "decodes_page_table": jnp.asarray(table, jnp.int32)}


def batch_of(jitted=False, **parts):
    metadata = PagedAttentionMetadata(**parts)
    return to_ragged_jit(metadata) if jitted else metadata.to_ragged_batch()


both_ways = pytest.mark.parametrize("jitted", [False, True])


@both_ways
def test_prefill_is_one_sequence(jitted):
    batch = batch_of(jitted, **prefill())
    assert batch.page_table.tolist() == [[1, 2, 3]]
    assert batch.kv_lens.tolist() == [9]
    assert batch.cu_q_lens.tolist() == [0, 5]
    assert (int(batch.num_seqs), batch.max_q_len) == (1, 8)


@both_ways
def test_decode_is_one_row_a_sequence_and_an_idle_sequence_a_gap(jitted):
    batch = batch_of(jitted, **decodes())
    assert batch.page_table.tolist() == [[4, 5], [7, 7], [6, 0]]
    assert batch.kv_lens.tolist() == [7, 0, 1]
    assert batch.cu_q_lens.tolist() == [0, 1, 2, 3]
    assert (int(batch.num_seqs), batch.max_q_len) == (3, 1)


@both_ways
def test_mixed_has_a_gap_over_the_chunks_padding(jitted):
    batch = batch_of(jitted, **prefill(), **decodes())
    assert batch.page_table.tolist() == [[1, 2, 3], [0, 0, 0], [4, 5, 0], [7, 7, 0], [6, 0, 0]]
    assert batch.kv_lens.tolist() == [9, 0, 7, 0, 1]
    assert batch.cu_q_lens.tolist() == [0, 5, 8, 9, 10, 11]
    assert (int(batch.num_seqs), batch.max_q_len) == (5, 8)


@pytest.mark.parametrize(
    ("length", "start", "rows", "kv_len"),
    [(1, 0, 1, 1), (8, 0, 8, 8), (0, 0, 0, 0), (12, 4, 8, 12), (5, 4, 1, 5), (4, 4, 0, 0)],
)
def test_chunk_lengths(length, start, rows, kv_len):
    batch = batch_of(**prefill(length, start))
    assert (batch.cu_q_lens.tolist(), batch.kv_lens.tolist()) == ([0, rows], [kv_len])


@pytest.mark.parametrize(("length", "start", "rows", "kv_len"), [(99, 4, 8, 12), (3, 4, 0, 0)])
def test_traced_lengths_outside_the_chunk_are_clipped_to_it(length, start, rows, kv_len):
    batch = batch_of(True, **prefill(length, start))
    assert (batch.cu_q_lens.tolist(), batch.kv_lens.tolist()) == ([0, rows], [kv_len])


@pytest.mark.parametrize(("start", "length", "row"), [(0, 8, 7), (8, 16, 7), (16, 19, 2), (16, 17, 0)])
def test_the_newest_row_is_within_the_chunk(start, length, row):
    metadata = PagedAttentionMetadata(**prefill(length, start))
    assert int(metadata.prefill_last_row) == row  # length - 1 would be a padding row, or past the chunk
    assert int(jax.jit(lambda m: m.prefill_last_row)(metadata)) == row


def test_modes():
    modes = [
        (PagedAttentionMetadata(**parts).is_prefill_mode(), PagedAttentionMetadata(**parts).is_decode_mode())
        for parts in (prefill(), decodes(), prefill() | decodes())
    ]
    assert modes == [(True, False), (False, True), (False, False)]


def test_parts_of_mixed_metadata():
    mixed = PagedAttentionMetadata(**prefill(), **decodes())
    assert mixed.prefill_part().is_prefill_mode()
    assert mixed.decode_part().is_decode_mode()
    np.testing.assert_array_equal(mixed.decode_part().decodes_page_table, mixed.decodes_page_table)
    with pytest.raises(ValueError, match="no decode part: decodes_position is None"):
        mixed.prefill_part().decode_part()
    with pytest.raises(ValueError, match="no prefill part: prefill_length is None"):
        mixed.decode_part().prefill_part()
    with pytest.raises(ValueError, match="no prefill part, so no newest row"):
        _ = mixed.decode_part().prefill_last_row


def test_is_a_pytree_whose_absent_parts_have_no_leaves():
    assert len(jax.tree.leaves(PagedAttentionMetadata(**decodes()))) == 2
    jax.tree.map(lambda _: None, PagedAttentionMetadata(**prefill()))  # unflattening checks nothing


@both_ways
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "neither a prefill nor a decode part"),
        (
            {"prefill_length": np.int32(3)},
            "prefill_position, prefill_page_table must be given too: a part needs all of prefill_length",
        ),
        (decodes() | {"decodes_page_table": None}, "decodes_page_table must be given too"),
        (prefill() | {"prefill_length": np.float32(3)}, r"prefill_length is float32\[\]; it must be int32 with 0 axes"),
        (prefill() | {"prefill_page_table": np.zeros((1, 3), np.int32)}, r"prefill_page_table is int32\[1, 3\]"),
        (prefill() | {"prefill_position": np.zeros(0, np.int32)}, "prefill_position is empty"),
        (decodes() | {"decodes_position": np.zeros((3, 1), np.int32)}, r"decodes_position is int32\[3, 1\]"),
        (decodes() | {"decodes_position": np.zeros(2, np.int32)}, "decodes_page_table has 3 rows, but .* 2 entries"),
    ],
)
def test_malformed_parts_are_refused(parts, message, jitted):
    with pytest.raises(ValueError, match=message):
        batch_of(jitted, **parts)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (prefill(length=13, start=4), r"prefill_length=13 must lie in 4\.\.12"),
        (prefill(length=3, start=4), r"prefill_length=3 must lie in 4\.\.12"),
        (prefill(length=1, start=-1), r"prefill_position\[0\]=-1 must not be negative"),
        (prefill(length=2, start=0) | {"prefill_position": i32(0, 2, 1)}, r"must be consecutive .* 0\.\.1"),
        (decodes(positions=(3, -2, 1)), r"decodes_position\[1\]=-2 must be a position, or -1"),
    ],
)
def test_senseless_values_are_refused_where_they_are_known(parts, message):
    with pytest.raises(ValueError, match=message):
        batch_of(**parts)


def test_padding_positions_may_hold_anything():
    batch = batch_of(**(prefill(length=2, start=0) | {"prefill_position": i32(0, 1, -1, -1)}))
    assert batch.cu_q_lens.tolist() == [0, 2]


def test_compiles_once_for_any_values():
    traced = jax.jit(functools.partial(PagedAttentionMetadata.to_ragged_batch))
    for length in (5, 9, 12):
        traced(PagedAttentionMetadata(**prefill(length)))
    assert traced._cache_size() == 1
