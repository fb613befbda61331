"""EasyDeL's description of a step, and the ragged batch that it stands for."""

import dataclasses
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int32

from paged_kernels import RaggedBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedAttentionMetadata:
    """One step: a chunk of one prompt, one new token of each decoding sequence, or both (mixed).

    A part that is absent is `None`.

        rows   | chunk of the prompt | its padding | sequence 0 | sequence 1 | ... |
               0                     n             chunk

    The prompt's tokens come first, then one row for each decoding sequence. A chunk has
    `n = clip(prefill_length - prefill_position[0], 0, chunk)` tokens; the rest of its rows are padding.
    """

    prefill_length: Int32[Array, ""] | None = None
    """Tokens of the prompt up to and including this chunk."""
    prefill_position: Int32[Array, " chunk"] | None = None
    """Positions of the chunk's tokens, consecutive; padding may hold anything."""
    prefill_page_table: Int32[Array, " pages_per_seq"] | None = None
    """The prompt's pages in order."""
    decodes_position: Int32[Array, " seqs"] | None = None
    """Position of each sequence's new token; -1 for an idle sequence, which reads and writes nothing."""
    decodes_page_table: Int32[Array, "seqs pages_per_seq"] | None = None
    """Each sequence's pages in order."""

    def is_prefill_mode(self) -> bool:
        """True if there is no decode part."""
        return self.decodes_position is None

    def is_decode_mode(self) -> bool:
        """True if there is no prefill part."""
        return self.prefill_length is None

    def prefill_part(self) -> "PagedAttentionMetadata":
        """Only the prompt's chunk.

        Raises:
            ValueError: there is none.
        """
        if self.is_decode_mode():
            raise ValueError(
                "metadata has no prefill part: prefill_length is None; give it, its position and its table"
            )
        return dataclasses.replace(self, decodes_position=None, decodes_page_table=None)

    def decode_part(self) -> "PagedAttentionMetadata":
        """Only the decoding sequences.

        Raises:
            ValueError: there are none.
        """
        if self.is_prefill_mode():
            raise ValueError("metadata has no decode part: decodes_position is None; give it and its page table")
        return dataclasses.replace(self, prefill_length=None, prefill_position=None, prefill_page_table=None)

    @property
    def prefill_last_row(self) -> Int32[Array, ""]:
        """The row of the prompt's newest token, `n - 1`, to sample from; 0 if the chunk has no token.

        Raises:
            ValueError: there is no prefill part, or it is malformed.
        """
        chunk = self._chunk()
        if chunk is None:
            raise ValueError("metadata has no prefill part, so no newest row; a decoding sequence has one row")
        return jnp.maximum(chunk.tokens() - 1, 0)

    def to_ragged_batch(self) -> RaggedBatch:
        """The step as a `RaggedBatch`: the chunk, then each decoding sequence.

        If both are there, a gap sequence between them covers the chunk's padding. The page tables of both parts are
        padded to one width. `max_q_len` is 1 in decode mode and the chunk's size otherwise. Works inside `jax.jit`.

        Raises:
            ValueError: a part is incomplete or of the wrong shape or dtype, or (in eager code, where values are
                known) a position or length makes no sense.
        """
        chunk, decodes = self._chunk(), self._decodes()
        if chunk is not None and decodes is not None:
            return _join(chunk.batch(), decodes.batch(), chunk.rows)
        part = chunk or decodes
        if part is None:
            raise ValueError("metadata has neither a prefill nor a decode part; give at least one")
        return part.batch()

    # Parts are checked when they are used and not in __post_init__, which unflattening a pytree runs too, with leaves
    # that need not be arrays.

    def _chunk(self) -> "_Chunk | None":
        return _checked(
            _Chunk, {name: getattr(self, name) for name in ("prefill_length", "prefill_position", "prefill_page_table")}
        )

    def _decodes(self) -> "_Decodes | None":
        return _checked(_Decodes, {name: getattr(self, name) for name in ("decodes_position", "decodes_page_table")})


class _Chunk(NamedTuple):
    """The prefill part, complete."""

    length: Int32[Array, ""]
    positions: Int32[Array, " chunk"]
    table: Int32[Array, " pages_per_seq"]

    NDIMS = (0, 1, 1)  # not annotated, so no field

    @property
    def rows(self) -> int:
        return self.positions.shape[0]

    def tokens(self) -> Int32[Array, ""]:
        """The number of rows that are tokens: `n` of the metadata's docstring."""
        return jnp.clip(self.length - self.positions[0], 0, self.rows)

    def batch(self) -> RaggedBatch:
        n = self.tokens()
        return RaggedBatch(
            page_table=jnp.asarray(self.table)[None],
            kv_lens=jnp.where(n > 0, self.positions[0] + n, 0)[None],
            cu_q_lens=jnp.stack([jnp.zeros_like(n), n]),
            num_seqs=jnp.int32(1),
            max_q_len=self.rows,
        )

    def check_shapes(self) -> None:
        if self.rows == 0:
            raise ValueError("prefill_position is empty; a chunk has at least 1 row")

    def check_values(self) -> None:
        positions, length = np.asarray(jax.device_get(self.positions)), int(jax.device_get(self.length))
        start = int(positions[0])
        if start < 0:
            raise ValueError(f"prefill_position[0]={start} must not be negative")
        if not start <= length <= start + self.rows:
            raise ValueError(
                f"prefill_length={length} must lie in {start}..{start + self.rows}: it counts the tokens up to and "
                f"including this chunk of {self.rows} rows, which starts at position {start}"
            )
        if (positions[: length - start] != np.arange(start, length)).any():
            raise ValueError(f"prefill_position must be consecutive over the chunk's tokens: {start}..{length - 1}")


class _Decodes(NamedTuple):
    """The decode part, complete."""

    positions: Int32[Array, " seqs"]
    table: Int32[Array, "seqs pages_per_seq"]

    NDIMS = (1, 2)

    def batch(self) -> RaggedBatch:
        seqs = self.positions.shape[0]
        return RaggedBatch(
            page_table=jnp.asarray(self.table),
            kv_lens=jnp.maximum(self.positions + 1, 0),
            cu_q_lens=jnp.arange(seqs + 1, dtype=jnp.int32),
            num_seqs=jnp.int32(seqs),
            max_q_len=1,
        )

    def check_shapes(self) -> None:
        if self.table.shape[0] != self.positions.shape[0]:
            raise ValueError(
                f"decodes_page_table has {self.table.shape[0]} rows, but decodes_position has "
                f"{self.positions.shape[0]} entries; they must be equal"
            )

    def check_values(self) -> None:
        positions = np.asarray(jax.device_get(self.positions))
        if positions.size and positions.min() < -1:
            at = positions.argmin()
            raise ValueError(f"decodes_position[{at}]={positions[at]} must be a position, or -1 for an idle sequence")


Part = TypeVar("Part", _Chunk, _Decodes)


def _checked(kind: type[Part], fields: dict[str, Array | None]) -> Part | None:
    """The part; `None` if all of it is absent. Values are checked if they are known (not traced)."""
    arrays = [array for array in fields.values() if array is not None]
    if not arrays:
        return None
    if len(arrays) < len(fields):
        missing = [name for name, array in fields.items() if array is None]
        raise ValueError(f"{', '.join(missing)} must be given too: a part needs all of {', '.join(fields)}")
    for name, array, ndim in zip(fields, arrays, kind.NDIMS, strict=True):
        if jnp.ndim(array) != ndim or jnp.result_type(array) != np.int32:
            raise ValueError(
                f"{name} is {jnp.result_type(array)}{list(jnp.shape(array))}; it must be int32 with {ndim} axes"
            )
    part = kind(*arrays)
    part.check_shapes()
    if not any(isinstance(array, Tracer) for array in arrays):
        part.check_values()
    return part


def _join(chunk: RaggedBatch, decodes: RaggedBatch, chunk_rows: int) -> RaggedBatch:
    """Both batches as one, with a gap sequence over the chunk's padding rows between them."""
    width = max(chunk.pages_per_seq, decodes.pages_per_seq)
    tables = [chunk.page_table, jnp.zeros((1, width), jnp.int32), decodes.page_table]
    return RaggedBatch(
        page_table=jnp.concatenate([_widen(table, width) for table in tables]),
        kv_lens=jnp.concatenate([chunk.kv_lens, jnp.zeros(1, jnp.int32), decodes.kv_lens]),
        cu_q_lens=jnp.concatenate([chunk.cu_q_lens, chunk_rows + decodes.cu_q_lens]),
        num_seqs=jnp.int32(2 + decodes.max_seqs),
        max_q_len=chunk_rows,
    )


def _widen(table: Array, width: int) -> Array:
    """`table` with null pages on its right, up to `width`."""
    return jnp.pad(table, ((0, 0), (0, width - table.shape[1])))
