"""The ordinary tests see faults in attention, models and engine: each edit of the source makes a named test fail."""

from pathlib import Path

import pytest
from mutants import Mutant, assert_seen

from paged_attn_layer._src.attention import attend
from paged_attn_layer._src.blocks import rope
from paged_attn_layer._src.blocks.attention import AttentionConfig, PagedAttention, QueryGrowth
from paged_attn_layer._src.blocks.norm import Norm
from paged_attn_layer._src.engine import compiled_step, scheduler
from paged_attn_layer._src.engine.engine import Engine
from paged_attn_layer._src.engine.request import Request
from paged_attn_layer._src.engine.scheduler import Scheduler
from paged_attn_layer._src.models.decoder import Decoder, DecoderLayer

pytestmark = pytest.mark.once

EVERY_KIND = "models/test_decoder.py::test_every_kind_of_layer_is_its_equation"
BLOCK = "blocks/test_attention.py"
PROMPT = f"{BLOCK}::test_a_whole_prompt_is_the_dense_layer"
TOKEN_BY_TOKEN = f"{BLOCK}::test_token_by_token_after_a_prefill_is_the_whole_prompt"
FAR = f"{BLOCK}::test_far_positions_turn_like_near_ones"
ROPE = "blocks/test_rope.py::test_frequencies_and_rotation_are_hugging_face_s"

ATTENTION = {
    "far_keys_turned_one_position_late": Mutant(
        PagedAttention._keys_and_values,
        "k = self._rotate(self._normed_heads(k, self.k_norm), positions)",
        "k = self._rotate(self._normed_heads(k, self.k_norm), positions + (positions > 40).astype(positions.dtype))",
        FAR,
    ),
    "queries_turned_one_position_early": Mutant(
        PagedAttention._queries,
        "self._normed_heads(self.q_proj(hidden), self.q_norm), positions)",
        "self._normed_heads(self.q_proj(hidden), self.q_norm), positions - 1)",
        f"{PROMPT}[plain]",
    ),
    "window_not_passed": Mutant(
        AttentionConfig.spec, "sliding_window=self.sliding_window", "sliding_window=None", f"{PROMPT}[options]"
    ),
    "sinks_not_passed": Mutant(
        PagedAttention._head_params,
        "self.sinks[...] if self.config.sinks else None",
        "None",
        f"{PROMPT}[sinks-alibi]",
    ),
    "keys_never_written": Mutant(
        attend._write_and_attend, "pages = write_kv(pages, k, v, batch)", "pass", f"{PROMPT}[plain]"
    ),
    "written_pages_lost": Mutant(
        attend.attend, "dataclasses.replace(view, pages=pages), lse", "view, lse", TOKEN_BY_TOKEN
    ),
    "half_of_each_pair_turned_back": Mutant(rope.apply_rope, "b * cos + a * sin", "b * cos - a * sin", ROPE),
    "frequencies_of_a_smaller_head": Mutant(
        rope.rope_frequencies,
        "np.arange(0, dim, 2) / whole",
        "np.arange(0, dim, 2) / (whole - 2)",
        ROPE,
    ),
    "values_not_normalised": Mutant(
        PagedAttention._keys_and_values,
        "v if self.v_norm is None else self.v_norm(v)",
        "v",
        f"{EVERY_KIND}[shared-keys]",
    ),
    "queries_grow_one_position_early": Mutant(
        QueryGrowth.factor, "positions // self.tokens", "(positions + 1) // self.tokens", f"{EVERY_KIND}[sinks-growth]"
    ),
    "halves_paired_where_neighbours_are": Mutant(
        rope._pairs, "if config.interleaved:", "if False:", f"{EVERY_KIND}[parallel-layer-norm]"
    ),
    "yarn_ramp_rounded_inwards": Mutant(
        rope._yarn,
        "math.floor(first), math.ceil(last)",
        "math.ceil(first), math.floor(last)",
        "models/test_read_rope.py::test_frequencies_are_transformers[yarn]",
    ),
    "mean_kept_by_a_layer_norm": Mutant(
        Norm.__call__, 'config.kind == "layer"', "False", "blocks/test_norm.py::test_it_is_the_equation[0.0-layer]"
    ),
    "llama3_slows_the_fast_pairs": Mutant(
        rope._llama3, "(1 - keep) * w / config.factor + keep * w", "keep * w / config.factor + (1 - keep) * w", ROPE
    ),
}

DECODER = "models/test_decoder.py"
EQUATION = f"{DECODER}::test_prefill_then_decode_is_the_equation"
WINDOWED = f"{EQUATION}[qwen2-window]"

MODEL = {
    "batch_of_another_group": Mutant(Decoder.__call__, "batches[place.group]", "batches[0]", WINDOWED),
    "cache_of_a_layer_lost": Mutant(
        Decoder.__call__, "hidden, views[place.view] = _run_layer", "hidden, _ = _run_layer", f"{EQUATION}[llama]"
    ),
    "residual_dropped": Mutant(
        DecoderLayer._add, "hidden + self.config.residual_multiplier * change", "change", f"{EQUATION}[llama]"
    ),
    "sandwich_without_its_second_norm": Mutant(
        DecoderLayer.__call__,
        "normed(attended, self.attention_post_norm)",
        "attended",
        f"{EVERY_KIND}[sandwich-offset]",
    ),
    "mlp_after_attention_in_a_parallel_layer": Mutant(
        DecoderLayer.__call__, "if not self.config.parallel:", "if True:", f"{EVERY_KIND}[parallel-layer-norm]"
    ),
    "inputs_of_the_first_layer_for_all": Mutant(
        Decoder._inputs_of_layers, "inputs[..., layer, :]", "inputs[..., 0, :]", f"{EVERY_KIND}[per-layer-inputs]"
    ),
    "embedding_not_scaled": Mutant(
        Decoder._embedded, " * self.config.embed_scale", "", f"{EVERY_KIND}[sandwich-offset]"
    ),
    "logits_not_scaled": Mutant(
        Decoder._logits, "logits * config.logit_scale", "logits", f"{EVERY_KIND}[parallel-layer-norm]"
    ),
    "logits_not_capped": Mutant(
        Decoder._logits, "logits if cap is None else", "logits if True else", f"{EVERY_KIND}[sandwich-offset]"
    ),
    "logits_of_the_row_before": Mutant(
        Decoder.__call__,
        "rows[..., None]",
        "jnp.maximum(rows - 1, 0)[..., None]",
        f"{DECODER}::test_sequences_share_a_step_and_only_the_rows_asked_for_get_logits",
    ),
}

SCHEDULER = "engine/test_scheduler.py"
ENGINE = "engine/test_engine.py"

SERVING = {
    "sampled_from_another_row": Mutant(
        compiled_step._next_tokens,
        "step.last_rows)",
        "step.last_rows + 1)",
        f"{ENGINE}::test_greedy_text_does_not_depend_on_the_batch[None]",
    ),
    "copies_of_shared_pages_dropped": Mutant(
        Engine._step,
        "self._compute.apply(self._manager.take_moves())",
        "self._manager.take_moves()",
        f"{ENGINE}::test_the_same_prompt_again_computes_only_its_last_token",
    ),
    "prefix_of_another_namespace": Mutant(
        Scheduler._admit,
        ", namespace=request.namespace",
        "",
        f"{SCHEDULER}::test_only_requests_of_the_same_namespace_share_pages",
    ),
    "every_chunk_samples": Mutant(
        scheduler._part,
        "q_len == request.num_uncomputed",
        "True",
        f"{SCHEDULER}::test_only_the_last_chunk_of_a_prompt_samples",
    ),
    "decodes_take_no_row_of_the_budget": Mutant(
        Scheduler._rows_of_running,
        "self.token_budget - sum(request.is_decoding for request in self.running)",
        "self.token_budget",
        f"{SCHEDULER}::test_decodes_in_every_slot_leave_rows_for_a_prompt",
    ),
    "claimed_pages_forgotten": Mutant(
        Scheduler._admit,
        "self.manager.num_free - self._claimed_pages()",
        "self.manager.num_free",
        f"{SCHEDULER}::test_pages_that_a_running_prompt_waits_for_are_not_given_to_the_next_request",
    ),
    "finished_request_keeps_its_pages": Mutant(
        Scheduler.finish,
        "self._release(request)",
        "pass",
        f"{SCHEDULER}::test_a_stop_string_frees_slot_and_pages_at_once",
    ),
    "answer_one_token_too_long": Mutant(
        Request.append,
        "self.num_tokens == self.max_tokens",
        "self.num_tokens > self.max_tokens",
        "engine/test_request.py::test_the_answer_ends_at_its_length",
    ),
}

MUTANTS = ATTENTION | MODEL | SERVING


@pytest.mark.parametrize("name", MUTANTS)
def test_fault_is_seen(name):
    assert_seen(MUTANTS[name], Path(__file__).parent)
