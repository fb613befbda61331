"""Chooses the next token of each sequence on the device.

One step may hold requests with any mix of `SamplingParams`. What they ask for is data, so nothing compiles for a new
mix. There are two programs beside the greedy one of the model's step, which has no sampler in it:

    samples     temperature, top_k, top_p, min_p
    adjusts     the same, after biases and penalties, which need the tokens of each sequence

The noise of a token depends on its request's seed and its position, never on the step or the row. So a request has the
same answer alone, in a crowd, and after it was preempted.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from paged_attn_layer._src.engine.params import MAX_BIASED_TOKENS
from paged_attn_layer._src.engine.request import Request

Fields = dict[str, Any]
"""The fields of a `row_type`, each an array with one entry a sequence."""


@functools.cache
def row_type(max_sequence_length: int | None) -> np.dtype:
    """The type of what is sent for one sequence: all fields take 4 bytes, so that a row is a list of int32.

    Args:
        max_sequence_length: the number of tokens that there is room for, if logits are adjusted; else `None`.
    """
    fields: list[Any] = [
        ("temperature", "f4"),
        ("top_k", "i4"),
        ("top_p", "f4"),
        ("min_p", "f4"),
        ("seed", "u4"),
        ("position", "i4"),  # of the token that is chosen
    ]
    if max_sequence_length is not None:
        fields += [
            ("repetition_penalty", "f4"),
            ("presence_penalty", "f4"),
            ("frequency_penalty", "f4"),
            ("prompt_length", "i4"),
            ("token_ids", "i4", (max_sequence_length,)),
            ("biased_ids", "i4", (MAX_BIASED_TOKENS,)),
            ("biases", "f4", (MAX_BIASED_TOKENS,)),
        ]
    return np.dtype(fields)


def greedy_rows(kind: np.dtype, max_seqs: int) -> np.ndarray:
    """Returns rows `[max_seqs]` that choose the likeliest token and adjust nothing."""
    rows = np.zeros(max_seqs, kind)
    rows["top_p"] = 1
    if "repetition_penalty" in _places(kind):
        rows["repetition_penalty"] = 1
    return rows


def pack_rows(requests: Sequence[Request | None], max_seqs: int, max_sequence_length: int) -> np.ndarray | None:
    """Returns the rows of a step; `None` if all its requests are greedy and none adjusts logits.

    Args:
        requests: for each sequence of the step its request, or `None` if it gets no token in this step.
        max_seqs: number of rows.
        max_sequence_length: most tokens of a sequence.
    """
    asking = [(row, r) for row, r in enumerate(requests) if r and not (r.sampling.is_greedy and not r.sampling.adjusts)]
    if not asking:
        return None
    adjusts = any(request.sampling.adjusts for _, request in asking)
    kind = row_type(max_sequence_length if adjusts else None)
    rows = greedy_rows(kind, max_seqs)
    for row, request in asking:
        params = request.sampling
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            rows[name][row] = min(getattr(params, name), 2**31 - 1) if name == "top_k" else getattr(params, name)
        rows["position"][row] = request.num_tokens
        if params.adjusts:
            _write_adjustments(rows[row], request)
    return rows


def _write_adjustments(row: Any, request: Request) -> None:
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        row[name] = getattr(request.sampling, name)
    row["prompt_length"] = len(request.prompt_ids)
    row["token_ids"][: request.num_tokens] = request.token_ids
    bias = request.biases()
    row["biased_ids"][: len(bias)] = list(bias)
    row["biases"][: len(bias)] = list(bias.values())


@functools.partial(jax.jit, static_argnames="kind")
def sample(
    logits: Float[Array, "seqs vocab"], sent: Int32[Array, "seqs words"], kind: np.dtype
) -> Int32[Array, " seqs"]:
    """Returns one token for each sequence.

    Args:
        logits: of the last row of each sequence.
        sent: rows of type `kind`, seen as int32.
        kind: a `row_type`.
    """
    fields = _fields(sent, kind)
    logits = logits.astype(jnp.float32)
    if "token_ids" in fields:
        logits = adjusted(logits, fields)
    likeliest = jnp.argmax(logits, axis=-1)
    temperature = fields["temperature"]
    possible = truncated(logits / jnp.where(temperature > 0, temperature, 1.0)[:, None], fields)
    drawn = jnp.argmax(possible + _noise(fields["seed"], fields["position"], logits.shape[1]), axis=-1)
    return jnp.where(temperature > 0, drawn, likeliest).astype(jnp.int32)


def _fields(sent: Int32[Array, "seqs words"], kind: np.dtype) -> Fields:
    """The fields of rows of type `kind`."""
    fields = {}
    for name, (dtype, offset) in _places(kind).items():
        words = sent[:, offset // 4 : (offset + dtype.itemsize) // 4]
        values = jax.lax.bitcast_convert_type(words, dtype.base)
        fields[name] = values if dtype.shape else values[:, 0]
    return fields


def _places(kind: np.dtype) -> dict[str, tuple[np.dtype, int]]:
    """The type of each field, and the byte at which it starts."""
    return {name: (field[0], field[1]) for name, field in (kind.fields or {}).items()}


def adjusted(logits: Float32[Array, "seqs vocab"], fields: Fields) -> Float32[Array, "seqs vocab"]:
    """Returns logits with biases and penalties."""
    row = jnp.arange(len(logits))[:, None]
    logits = logits.at[row, fields["biased_ids"]].add(fields["biases"])
    seen, counts = _seen(fields, logits.shape[1])
    penalty = fields["repetition_penalty"][:, None]
    logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    logits -= fields["frequency_penalty"][:, None] * counts.astype(jnp.float32)
    return logits - fields["presence_penalty"][:, None] * (counts > 0).astype(jnp.float32)


def _seen(fields: Fields, vocab_size: int) -> tuple[Bool[Array, "seqs vocab"], Int32[Array, "seqs vocab"]]:
    """Which tokens a sequence has, and how often its answer has each."""
    token_ids = fields["token_ids"]
    row, column = jnp.arange(len(token_ids))[:, None], jnp.arange(token_ids.shape[1])[None]
    is_token = column < fields["position"][:, None]
    is_answer = is_token & (column >= fields["prompt_length"][:, None])
    nothing = jnp.zeros((len(token_ids), vocab_size), jnp.int32)
    seen = nothing.at[row, token_ids].max(is_token.astype(jnp.int32)) > 0
    return seen, nothing.at[row, token_ids].add(is_answer.astype(jnp.int32))


def truncated(logits: Float32[Array, "seqs vocab"], fields: Fields) -> Float32[Array, "seqs vocab"]:
    """Returns logits that are -inf for tokens that `top_k`, `top_p` or `min_p` excludes, in this order."""
    asked = jnp.any((fields["top_k"] > 0) | (fields["top_p"] < 1))  # most steps need not sort
    least = jax.lax.cond(asked, _least_logit, lambda logits, _: jnp.full(len(logits), -jnp.inf), logits, fields)
    least = jnp.maximum(least, jnp.max(logits, axis=-1) + jnp.log(fields["min_p"]))
    return jnp.where(logits < least[:, None], -jnp.inf, logits)


def _least_logit(logits: Float32[Array, "seqs vocab"], fields: Fields) -> Float32[Array, " seqs"]:
    """The logit of the least likely token that `top_k` and `top_p` allow."""
    vocab_size = logits.shape[1]
    ordered = jnp.sort(logits, axis=-1)
    top_k = jnp.where(fields["top_k"] > 0, jnp.minimum(fields["top_k"], vocab_size), vocab_size)
    least_of_top_k = jnp.take_along_axis(ordered, vocab_size - top_k[:, None], axis=1)
    ordered = jnp.where(ordered < least_of_top_k, -jnp.inf, ordered)
    up_to = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)  # the probability of it and all that are less likely
    allowed = (up_to > 1 - fields["top_p"][:, None]) & (ordered > -jnp.inf)
    allowed = allowed.at[:, -1].set(True)
    return jnp.min(jnp.where(allowed, ordered, jnp.inf), axis=-1)


def _noise(
    seeds: UInt32[Array, " seqs"], positions: Int32[Array, " seqs"], vocab_size: int
) -> Float32[Array, "seqs vocab"]:
    """Gumbel noise: the likeliest token of logits with noise is a draw from their softmax."""

    def noise(seed: UInt32[Array, ""], position: Int32[Array, ""]) -> Float32[Array, " vocab"]:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (vocab_size,), jnp.float32)

    return jax.vmap(noise)(seeds, positions)
