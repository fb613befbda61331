"""The ordinary tests catch a kernel's faults: each edit of its source here makes one of the named tests fail."""

from pathlib import Path

import pytest
from mutants import Mutant, assert_seen

from paged_kernels._src import kv_layout, kv_pages
from paged_kernels._src.attention import mask, merge
from paged_kernels._src.attention.tpu import schedule, singles
from paged_kernels._src.attention.tpu import softmax as tpu_softmax
from paged_kernels._src.attention.xla import softmax as xla_softmax
from paged_kernels._src.page_write import slots
from paged_kernels._src.page_write.tpu import runs

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
        "jnp.where(jnp.isnan(x).any(axis=-1), jnp.nan, jnp.max(x, axis=-1))",
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
        "0.0, 1.0",
        "0.0, 0.0",
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

MUTANTS = MASK | LAYOUT | ARITHMETIC | INTEGERS


@pytest.mark.parametrize("name", MUTANTS)
def test_fault_is_seen(name):
    assert_seen(MUTANTS[name], Path(__file__).parent)
