"""The seed's description of a step, and its meaning as a ragged batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32
from paged_kernels import RaggedBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedAttentionMetadata:
    """One step: a chunk of one prompt, one new token of each decode slot, or both (mixed). Absent parts are `None`.

        rows   | chunk of the prompt | its padding | slot 0 | slot 1 | ... |
               0                     n             chunk

    The prompt's tokens come first, then one row a decode slot. A chunk has
    `n = clip(prefill_length - prefill_position[0], 0, chunk)` tokens; the rest of its rows are padding.
    """

    prefill_length: Int32[Array, ""] | None = None
    """Tokens of the prompt up to and including this chunk."""
    prefill_position: Int32[Array, " chunk"] | None = None
    """Positions of the chunk's tokens, consecutive; padding may hold anything."""
    prefill_page_table: Int32[Array, " pages_per_seq"] | None = None
    """The prompt's pages in order."""
    decodes_position: Int32[Array, " seqs"] | None = None
    """Position of each slot's new token; -1 for an idle slot, which reads and writes nothing."""
    decodes_page_table: Int32[Array, "seqs pages_per_seq"] | None = None
    """Each slot's pages in order."""

    def is_prefill_mode(self) -> bool:
        """Whether there is no decode part."""
        return self.decodes_position is None

    def is_decode_mode(self) -> bool:
        """Whether there is no prefill part."""
        return self.prefill_length is None

    def prefill_part(self) -> "PagedAttentionMetadata":
        """The prompt's chunk alone.

        Raises:
            ValueError: there is none.
        """
        if self.is_decode_mode():
            raise ValueError(
                "metadata has no prefill part: prefill_length is None; give it with its position and table"
            )
        return dataclasses.replace(self, decodes_position=None, decodes_page_table=None)

    def decode_part(self) -> "PagedAttentionMetadata":
        """The decode slots alone.

        Raises:
            ValueError: there are none.
        """
        if self.is_prefill_mode():
            raise ValueError("metadata has no decode part: decodes_position is None; give it with its page table")
        return dataclasses.replace(self, prefill_length=None, prefill_position=None, prefill_page_table=None)

    @property
    def prefill_last_row(self) -> Int32[Array, ""]:
        """Row of the prompt's newest token, `n - 1`: the one to sample from. 0 when the chunk has no token.

        Raises:
            ValueError: there is no prefill part, or it is malformed.
        """
        part = self.prefill_part()
        _check(part)
        return jnp.maximum(part._chunk_tokens() - 1, 0)

    @property
    def decode_rows_start(self) -> int:
        """Row of decode slot 0: the chunk's size, 0 in decode mode."""
        return 0 if self.prefill_position is None else self.prefill_position.shape[0]

    def to_ragged_batch(self) -> RaggedBatch:
        """The step as a `RaggedBatch`: the chunk, a gap for its padding (only if decodes follow), then each slot.

        Works inside `jax.jit`. The tables of both parts are padded to one width. `max_q_len` is 1 in decode mode and
        the chunk's size otherwise.

        Raises:
            ValueError: a part is incomplete or of the wrong shape or dtype, or (in eager code, where values are
                known) a position or length makes no sense.
        """
        _check(self)
        if self.is_decode_mode():
            return self._decode_batch()
        if self.is_prefill_mode():
            return self._prefill_batch()
        return _join(self._prefill_batch(), self._decode_batch(), chunk=self.decode_rows_start)

    def _chunk_tokens(self) -> Int32[Array, ""]:
        return jnp.clip(self.prefill_length - self.prefill_position[0], 0, self.prefill_position.shape[0])

    def _prefill_batch(self) -> RaggedBatch:
        n = self._chunk_tokens()
        kv_len = jnp.where(n > 0, self.prefill_position[0] + n, 0)
        return RaggedBatch(
            page_table=jnp.asarray(self.prefill_page_table)[None],
            kv_lens=kv_len[None],
            cu_q_lens=jnp.stack([jnp.zeros_like(n), n]),
            num_seqs=jnp.int32(1),
            max_q_len=self.prefill_position.shape[0],
        )

    def _decode_batch(self) -> RaggedBatch:
        seqs = self.decodes_position.shape[0]
        return RaggedBatch(
            page_table=jnp.asarray(self.decodes_page_table),
            kv_lens=jnp.maximum(self.decodes_position + 1, 0),
            cu_q_lens=jnp.arange(seqs + 1, dtype=jnp.int32),
            num_seqs=jnp.int32(seqs),
            max_q_len=1,
        )


def _join(prefill: RaggedBatch, decodes: RaggedBatch, chunk: int) -> RaggedBatch:
    """Both batches as one, with a gap sequence over the chunk's padding rows between them."""
    width = max(prefill.pages_per_seq, decodes.pages_per_seq)
    gap_table = jnp.zeros((1, width), jnp.int32)
    gap_len = jnp.zeros(1, jnp.int32)
    return RaggedBatch(
        page_table=jnp.concatenate([_widen(prefill.page_table, width), gap_table, _widen(decodes.page_table, width)]),
        kv_lens=jnp.concatenate([prefill.kv_lens, gap_len, decodes.kv_lens]),
        cu_q_lens=jnp.concatenate([prefill.cu_q_lens, chunk + decodes.cu_q_lens]),
        num_seqs=jnp.int32(2 + decodes.seqs),
        max_q_len=chunk,
    )


def _widen(table: Array, width: int) -> Array:
    """`table` with null pages on its right, up to `width`."""
    return jnp.pad(table, ((0, 0), (0, width - table.shape[1])))


_PARTS = {
    "prefill": {"prefill_length": 0, "prefill_position": 1, "prefill_page_table": 1},
    "decode": {"decodes_position": 1, "decodes_page_table": 2},
}
"""Fields of each part, and how many axes each has."""


def _check(metadata: PagedAttentionMetadata) -> None:
    # Not in __post_init__: unflattening a pytree runs that with leaves that are no arrays.
    for part, ndims in _PARTS.items():
        _check_part(metadata, part, ndims)
    if metadata.is_prefill_mode() and metadata.is_decode_mode():
        raise ValueError("metadata has neither a prefill nor a decode part; give at least one")
    if not metadata.is_prefill_mode():
        _check_decodes(metadata)
    if not metadata.is_decode_mode():
        _check_prefill(metadata)


def _check_part(metadata: PagedAttentionMetadata, part: str, ndims: dict[str, int]) -> None:
    given = {name: getattr(metadata, name) for name in ndims}
    missing = [name for name, array in given.items() if array is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"the {part} part lacks {', '.join(missing)}; give all of {', '.join(ndims)}, or none")
    for name, array in given.items():
        if array is not None and (jnp.ndim(array) != ndims[name] or jnp.result_type(array) != np.int32):
            raise ValueError(
                f"{name} is {jnp.result_type(array)}{list(jnp.shape(array))}; it must be int32 with {ndims[name]} axes"
            )


def _check_decodes(metadata: PagedAttentionMetadata) -> None:
    positions, table = metadata.decodes_position, metadata.decodes_page_table
    if table.shape[0] != positions.shape[0]:
        raise ValueError(
            f"decodes_page_table has {table.shape[0]} rows, decodes_position {positions.shape[0]} slots; "
            "they must be equal"
        )
    if not isinstance(positions, jax.core.Tracer) and (np.asarray(positions) < -1).any():
        slot = int(np.argmin(positions))
        raise ValueError(f"decodes_position[{slot}]={positions[slot]} must be a position, or -1 for an idle slot")


def _check_prefill(metadata: PagedAttentionMetadata) -> None:
    length, positions = metadata.prefill_length, metadata.prefill_position
    chunk = positions.shape[0]
    if chunk == 0:
        raise ValueError("prefill_position is empty; a chunk has at least 1 row")
    if isinstance(length, jax.core.Tracer) or isinstance(positions, jax.core.Tracer):
        return
    start, length = int(positions[0]), int(length)
    if start < 0:
        raise ValueError(f"prefill_position[0]={start} must not be negative")
    if not start <= length <= start + chunk:
        raise ValueError(
            f"prefill_length={length} must lie in {start}..{start + chunk}: it counts the tokens up to and including "
            f"this chunk of {chunk} rows, which starts at position {start}"
        )
    n = length - start
    if (np.asarray(positions[:n]) != np.arange(start, length)).any():
        raise ValueError(f"prefill_position must be consecutive over the chunk's {n} tokens: {start}..{length - 1}")
