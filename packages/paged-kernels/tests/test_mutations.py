"""The ordinary tests catch a kernel's faults: each edit of its source here makes one of the named tests fail."""

from pathlib import Path

import pytest
from mutants import Mutant, assert_seen

from paged_kernels._src import kv_layout, kv_pages
from paged_kernels._src.attention import mask, merge
from paged_kernels._src.attention.tpu import scales, schedule, singles, unpack
from paged_kernels._src.attention.tpu import softmax as tpu_softmax
from paged_kernels._src.attention.tpu.copies import PageStream, RowStream
from paged_kernels._src.attention.tpu.decode import DecodeAttention
from paged_kernels._src.attention.tpu.subblocks import SubBlockStream
from paged_kernels._src.attention.tpu.tile_attention import TileAttention
from paged_kernels._src.attention.xla import softmax as xla_softmax
from paged_kernels._src.attention.xla import work_list
from paged_kernels._src.attention.xla.walk import Walk
from paged_kernels._src.page_write import slots
from paged_kernels._src.page_write.tpu import merge as register_merge
from paged_kernels._src.page_write.tpu import runs
from paged_kernels._src.page_write.tpu.copies import RowCopies, RunCopies, ScaleCopies

pytestmark = pytest.mark.once

ROWS = "attention/test_mask.py::test_each_row_sees_its_keys"
TREE_RANGES = "attention/test_mask.py::test_ranges_of_visible_keys_agree_with_single_keys_of_a_tree"
RANGES = "attention/test_mask.py::test_ranges_of_visible_keys_agree_with_single_keys"
TREE_BITS = "attention/test_mask.py::test_each_bit_of_a_tree_mask_is_a_new_token"
HALF_A_STEP = "test_kv_layout.py::test_quantised_rows_come_back_to_half_a_step"
XLA_SOFTMAX = "attention/xla/test_softmax.py::test_blocks_in_any_cut_give_the_softmax"
TPU_SOFTMAX = "attention/tpu/test_softmax.py::test_blocks_add_up_to_the_whole"
MERGE = "attention/test_merge.py::test_parts_with_no_key_weigh_nothing"
RUNS = "page_write/tpu/test_runs.py::test_a_run_ends_at_its_span_its_page_and_at_a_row_that_goes_nowhere"
WINDOW_EDGE = "attention/tpu/test_launch.py::test_a_block_may_begin_with_the_last_key_before_the_window"
XLA_WRITE = "page_write/test_api.py::test_writes_its_slots_and_no_other_byte"
TILES = "attention/tpu/test_schedule.py::test_tiles_equal_those_made_by_hand"

MASK = {
    "window_one_too_wide": Mutant(mask.visible, "t - p < spec", "t - p <= spec", ROWS),
    "causal_one_too_many": Mutant(mask.visible, "p <= t", "p <= t + 1", ROWS),
    "causal_one_too_few": Mutant(mask.visible, "p <= t", "p < t", ROWS),
    "key_past_the_end": Mutant(mask.visible, "p < kv_len", "p <= kv_len", ROWS),
    "whole_block_past_the_window": Mutant(mask.fully_visible, "p_lo < spec", "p_lo <= spec", RANGES),
    "whole_block_past_the_window_in_the_kernel": Mutant(
        mask.fully_visible, "p_lo < spec", "p_lo <= spec", f"{WINDOW_EDGE}[prefill]"
    ),
    "whole_block_past_the_window_in_decode": Mutant(
        mask.fully_visible, "p_lo < spec", "p_lo <= spec", f"{WINDOW_EDGE}[decode]"
    ),
    "whole_block_past_the_row": Mutant(mask.fully_visible, "p_hi <= t_lo + 1", "p_hi <= t_lo + 2", RANGES),
    "whole_block_past_the_end": Mutant(mask.fully_visible, "p_hi <= kv_len", "p_hi <= kv_len + 8", RANGES),
    "whole_block_in_the_tree": Mutant(mask.fully_visible, "p_hi <= first_new", "p_hi <= first_new + 1", TREE_RANGES),
    "first_key_one_late": Mutant(mask.key_range, "spec.sliding_window + 1", "spec.sliding_window + 2", RANGES),
    "last_key_one_early": Mutant(mask.key_range, "jnp.minimum(kv_len, t_hi)", "jnp.minimum(kv_len, t_hi - 1)", RANGES),
    "range_of_a_tree_ends_at_the_row": Mutant(
        mask.key_range,
        "spec.causal and not tree",
        "spec.causal",
        "attention/tpu/test_schedule.py::test_tree_rows_need_the_pages_of_all_new_tokens",
    ),
    "tree_word_of_the_token_before": Mutant(mask.in_tree, "new >> 5 == index", "new - 1 >> 5 == index", TREE_BITS),
    "tree_ends_a_word_late": Mutant(mask.in_tree, "new < 32 * len(words)", "new < 32 * len(words) + 32", TREE_BITS),
    "tree_hides_the_old_keys": Mutant(mask.in_tree, "(new < 0) | (", "(new >= 0) & (", TREE_BITS),
}

LAYOUT = {
    "half_the_scale": Mutant(
        kv_layout.scale_of, "largest / LARGEST[dtype]", "largest / LARGEST[dtype] / 2", HALF_A_STEP
    ),
    "scale_a_step_too_large": Mutant(
        kv_layout.scale_of,
        "largest / LARGEST[dtype]",
        "largest / (LARGEST[dtype] - 1)",
        "test_kv_layout.py::test_largest_magnitude_takes_the_largest_stored_value",
    ),
    "nan_passes_for_a_number": Mutant(
        kv_layout.scale_of,
        "jnp.where(jnp.isnan(total), total, jnp.max(x, axis=-1))",
        "jnp.nanmax(x, axis=-1)",
        "test_kv_layout.py::test_rows_of_zeros_and_rows_that_are_not_finite",
    ),
    "nibbles_swapped": Mutant(
        kv_layout._unpack_nibbles,
        "[(entries << 4) >> 4, entries >> 4]",
        "[entries >> 4, (entries << 4) >> 4]",
        HALF_A_STEP,
    ),
    "low_nibble_without_its_sign": Mutant(
        kv_layout._unpack_nibbles, "(entries << 4) >> 4", "entries & 0xF", HALF_A_STEP
    ),
    "scale_of_k_for_v": Mutant(kv_layout.KVLayout.unpack, "scales[..., -1:]", "scales[..., :1]", HALF_A_STEP),
    "v_from_the_first_lane_of_its_register": Mutant(
        kv_layout.KVLayout.unpack,
        "v = entries[..., : self.k_dim], entries[..., self.v_start : self.v_start + self.v_dim]",
        "v = entries[..., : self.k_dim], entries[..., self.v_lanes][..., : self.v_dim]",
        "test_kv_layout.py::test_plain_rows_come_back",
    ),
}

ARITHMETIC = {
    "part_with_no_key_weighs_something": Mutant(
        merge.merge_attention_states, "jnp.where(jnp.isneginf(lse), 0, lse)", "lse", MERGE
    ),
    "parts_weigh_alike": Mutant(merge.merge_attention_states, "jnp.exp(lses -", "jnp.exp(0 * lses -", MERGE),
    "xla_values_keep_the_old_maximum": Mutant(
        xla_softmax.SoftmaxState.add_keys, "decay[..., None] * self.values", "self.values", XLA_SOFTMAX
    ),
    "xla_total_keeps_the_old_maximum": Mutant(
        xla_softmax.SoftmaxState.add_keys, "decay * self.total", "self.total", XLA_SOFTMAX
    ),
    "xla_sink_without_weight": Mutant(
        xla_softmax.SoftmaxState.initial,
        "jnp.ones_like",
        "jnp.zeros_like",
        "attention/xla/test_walk.py::test_block_sizes_do_not_matter[1x1]",
    ),
    "xla_cap_dropped": Mutant(
        xla_softmax.logits,
        "soft_cap * jnp.tanh(s / soft_cap)",
        "s",
        "attention/xla/test_softmax.py::test_logits_are_capped",
    ),
    "tpu_maximum_not_carried": Mutant(tpu_softmax.add_keys, "return State(m,", "return State(state.m,", TPU_SOFTMAX),
    "tpu_total_not_rescaled": Mutant(tpu_softmax.add_keys, "state.l * shrink", "state.l", TPU_SOFTMAX),
    "tpu_values_not_rescaled": Mutant(
        tpu_softmax.add_keys, "state.acc * _widen(shrink, v.shape[1])", "state.acc", TPU_SOFTMAX
    ),
    "tpu_log_sum_exp_to_base_two": Mutant(tpu_softmax.log_sum_exp, "(1 / LOG2_E)", "1.0", TPU_SOFTMAX),
    "tpu_cap_before_the_scale": Mutant(
        tpu_softmax.Logits.__call__,
        "jnp.tanh(qk * (self.scale / self.soft_cap)) * (self.soft_cap * LOG2_E)",
        "jnp.tanh(qk / self.soft_cap) * (self.scale * self.soft_cap * LOG2_E)",
        TPU_SOFTMAX,
    ),
}

INTEGERS = {
    "tile_dropped": Mutant(
        schedule.make_tiles,
        "(end - 1) // q_rows + 1 - first_block",
        "jnp.maximum((end - 1) // q_rows - first_block, 1)",
        f"{TILES}[plain-16-mixed]",
    ),
    "last_page_dropped": Mutant(
        schedule.make_tiles, "-(-end_key // page_size)", "end_key // page_size", f"{TILES}[plain-16-mixed]"
    ),
    "page_before_the_window": Mutant(
        schedule.make_tiles,
        "first_page = jnp.minimum(first_key, kv_len - 1) // page_size",
        "first_page = jnp.maximum(jnp.minimum(first_key, kv_len - 1) // page_size - 1, 0)",
        f"{TILES}[window-1-decode]",
    ),
    "rows_of_singles_swapped": Mutant(
        singles.take_singles,
        "rows = jnp.where(is_single, starts, tokens)",
        "rows = jnp.where(is_single, starts[::-1], tokens)",
        "attention/tpu/test_singles.py",
    ),
    "singles_attended_twice": Mutant(
        singles.take_singles, "jnp.where(is_single, 0, batch.kv_lens)", "batch.kv_lens", "attention/tpu/test_singles.py"
    ),
    "null_page_written": Mutant(
        kv_pages.KVPages._drop_unwritable,
        "page_ids > 0",
        "page_ids >= 0",
        f"{XLA_WRITE}[null_page]",
    ),
    "null_page_in_a_run": Mutant(
        runs._run_starts, "page_ids > 0", "page_ids >= 0", "page_write/tpu/test_runs.py::test_no_rows_make_no_runs"
    ),
    "rows_past_the_table_written": Mutant(
        slots.row_slots, "(index < batch.pages_per_seq) & ", "", "page_write/test_slots.py"
    ),
    "slot_one_off": Mutant(
        slots.row_slots,
        "rows.position % pages.page_size",
        "(rows.position + 1) % pages.page_size",
        "page_write/test_slots.py",
    ),
    "run_one_short": Mutant(
        runs.list_runs, "next_stop.astype(jnp.int32) - row", "next_stop.astype(jnp.int32) - row - 1", RUNS
    ),
    "run_across_pages": Mutant(runs._run_starts, "(before == page_ids) & ", "", RUNS),
}

WALK = "attention/xla/test_walk.py::test_block_sizes_do_not_matter[1x1]"
WALK_BIDIRECTIONAL = "attention/test_api.py::test_xla_equals_dense_attention[mixed-bidirectional]"
WORK_LIST = "attention/xla/test_work_list.py"

XLA_WALK = {
    "scale_dropped": Mutant(Walk.take_rows, " * self.spec.resolved_scale(head_dim)", "", WALK),
    "cap_dropped": Mutant(Walk.attend, "self.spec.soft_cap", "None", WALK),
    "bias_of_the_wrong_sign": Mutant(Walk.bias, "-slopes", "slopes", WALK),
    "slope_of_another_head": Mutant(
        Walk.bias,
        "self.of_kv_heads(self.head_params.alibi_slopes)",
        "self.of_kv_heads(self.head_params.alibi_slopes)[:, ::-1]",
        WALK,
    ),
    "sinks_forgotten": Mutant(Walk.sinks, "self.head_params.sinks is None", "True", WALK),
    "table_one_page_back": Mutant(Walk.fetch, "[tile.seq, index]", "[tile.seq, jnp.maximum(index - 1, 0)]", WALK),
    "table_of_the_sequence_before": Mutant(Walk.fetch, "[tile.seq, index]", "[tile.seq - 1, index]", WALK),
    "last_page_repeated": Mutant(Walk.attend, "tile.kv_end,", "tile.kv_end + page_size,", WALK_BIDIRECTIONAL),
    "values_that_nobody_sees": Mutant(
        Walk.attend, "jnp.where(sees.any(axis=0)[:, None], v, 0)", "v", WALK_BIDIRECTIONAL
    ),
    "rows_of_the_next_sequence": Mutant(Walk.put_rows, "< tile.num_rows", "<= tile.num_rows", WALK_BIDIRECTIONAL),
    "rows_before_the_first_token": Mutant(
        Walk.is_token, "t >= 0", "t >= -99", "attention/xla/test_walk.py::test_rows_at_negative_positions_give_zeros"
    ),
    "last_tile_too_long": Mutant(
        work_list.make_work_list, "jnp.minimum(q_rows, q_lens[seq] - rows_before)", "q_rows + 0 * seq", WORK_LIST
    ),
    "gaps_listed": Mutant(work_list.make_work_list, " & (batch.kv_lens > 0)", "", WORK_LIST),
}

LAUNCH = "attention/tpu/test_launch.py"
DECODE, PREFILL = f"{WINDOW_EDGE}[decode]", f"{WINDOW_EDGE}[prefill]"
RAGGED_DECODE = f"{LAUNCH}::test_workloads_in_float32[decode]"
RAGGED_PREFILL = f"{LAUNCH}::test_workloads_in_float32[prefill_many]"
CHUNKS = f"{LAUNCH}::test_workloads_in_float32[chunked_prefill]"
INT4 = f"{LAUNCH}::test_pages_with_scales[decode-float32-int4]"
SINKS = f"{LAUNCH}::test_parameters_of_the_heads[gaps-sinks-plain]"

TPU_ATTENTION = {
    "k_with_the_scale_of_v": Mutant(
        TileAttention.score, "keys.scales[0,", "keys.scales[c.layout.scales_per_entry - 1,", INT4
    ),
    "v_with_the_scale_of_k": Mutant(TileAttention.add_keys, "c.layout.scales_per_entry - 1", "0", INT4),
    "scales_not_over_the_unit": Mutant(TileAttention.spread_scales, " * unit(c)", "", INT4),
    "values_that_are_not_real": Mutant(TileAttention.add_keys, "keys.in_range is None", "True", PREFILL),
    "mask_dropped": Mutant(TileAttention.score, "keys.mask is None", "True", PREFILL),
    "sink_without_weight": Mutant(TileAttention.initial, "column + 1 / LANES", "column", SINKS),
    "tile_inherits_a_state": Mutant(
        TileAttention._finish_part, "self.store(part, self.initial(part))", "pass", RAGGED_PREFILL
    ),
    "tile_overwrites_its_block": Mutant(TileAttention._finish_part, "mine & of_tile", "mine", CHUNKS),
    "buffer_of_another_block": Mutant(
        TileAttention.whole_keys, "s.pages.kv.at[kv_buffer]", "s.pages.kv.at[(kv_buffer + 1) % c.buffers]", PREFILL
    ),
    "pages_not_waited_for": Mutant(
        PageStream.wait_whole, "self.copies.wait(self.buffer(at), self.config.kv_pages)", "pass", PREFILL
    ),
    "ids_of_another_block": Mutant(PageStream._start_page, "at.block %", "(at.block + 1) %", PREFILL),
    "queries_not_waited_for": Mutant(RowStream.wait_q, "copy.wait()", "pass", PREFILL),
    "output_not_waited_for": Mutant(RowStream.wait_out, "copy.wait()", "pass", PREFILL),
    "sequence_inherits_a_state": Mutant(DecodeAttention._add_keys, "jnp.where(begins, new, old)", "old", RAGGED_DECODE),
    "row_of_the_block_s_first_sequence": Mutant(
        DecodeAttention._operand, "self.tiles.row_lo[subblock.tile]", "0", RAGGED_DECODE
    ),
    "state_reset_with_each_block": Mutant(
        DecodeAttention.begin_tile, "first.page == self.tiles.first_page[first.tile]", "first.page >= 0", DECODE
    ),
    "subblocks_skip_a_sequence": Mutant(
        SubBlockStream.assign, "tile + done.astype(jnp.int32)", "tile + 2 * done.astype(jnp.int32)", RAGGED_DECODE
    ),
    "subblocks_not_waited_for": Mutant(
        SubBlockStream.wait,
        "self.copies.wait(self.buffer(block), self.subblock(block, i).count, i)",
        "pass",
        RAGGED_DECODE,
    ),
    "nibbles_not_shifted": Mutant(unpack.low_nibbles, " << 4", "", "attention/tpu/test_unpack.py::test_int4"),
    "scales_of_v_where_those_of_k_are": Mutant(
        scales._side_by_side, "(j - kind) * page_size", "j * page_size", "attention/tpu/test_scales.py"
    ),
}

TPU_WRITE = "page_write/tpu/test_launch.py::test_writes_its_slots_and_no_other_byte[chunks-int8]"
EAGER_WRITE = "page_write/tpu/test_launch.py::test_copies_may_complete_at_once[chunks-int8]"
MERGE_ROWS = "page_write/tpu/test_merge.py::test_rows_land_in_their_slots_bit_for_bit"
MERGE_LANES = "page_write/tpu/test_merge.py::test_scales_land_in_their_lanes_bit_for_bit"

PAGE_WRITE = {
    "kept_rows_never_read": Mutant(RowCopies._keeps_some, "< self.span", "< 0", TPU_WRITE),
    "kept_scales_never_read": Mutant(ScaleCopies._keeps_some, "> 0", "< 0", TPU_WRITE),
    "row_one_slot_too_far": Mutant(RowCopies.merge, "shift=shift", "shift=shift + 1", TPU_WRITE),
    "scales_of_v_over_those_of_k": Mutant(ScaleCopies.merge, "kind * self.page_size + ", "", TPU_WRITE),
    "new_rows_not_waited_for": Mutant(RunCopies.wait_read, "self._strip_read(run).wait()", "pass", TPU_WRITE),
    "runs_share_a_buffer": Mutant(RunCopies.buffer, "run %", "0 * run %", EAGER_WRITE),
    "merge_keeps_old_rows": Mutant(register_merge.merge_rows, "new_words & mask", "old_words & mask", MERGE_ROWS),
    "merge_one_row_too_many": Mutant(register_merge._row_mask, "row < end", "row <= end", MERGE_ROWS),
    "merge_one_lane_too_many": Mutant(register_merge.merge_lanes, "lane < end", "lane <= end", MERGE_LANES),
}

MUTANTS = MASK | LAYOUT | ARITHMETIC | INTEGERS | XLA_WALK | TPU_ATTENTION | PAGE_WRITE


@pytest.mark.parametrize("name", MUTANTS)
def test_fault_is_seen(name):
    assert_seen(MUTANTS[name], Path(__file__).parent)
