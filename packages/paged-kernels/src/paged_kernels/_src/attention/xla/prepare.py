"""The static sizes of the walk, and what it needs from a step's batch, made once for all layers."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from paged_kernels._src.attention.block_sizes import BlockSizes
from paged_kernels._src.attention.xla.work_list import WorkList, make_work_list
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.call import AttentionCall
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.spec import AttentionSpec

DEFAULT_Q_ROWS = 64
DEFAULT_KEYS = 256
MOST_BLOCK_BYTES = 2 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class WalkConfig:
    """The static facts of a walk."""

    spec: AttentionSpec
    tokens: int
    """The rows of q."""
    page_size: int
    q_rows: int
    """Rows of a full tile."""
    kv_pages: int
    """Pages in a block."""
    decode: bool
    """True if every sequence has at most one row."""

    @property
    def tile_rows(self) -> tuple[int, ...]:
        """The rows of a tile in each loop: first for single-row sequences, then for the others."""
        return (1,) if self.decode else (1, self.q_rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeRows:
    """The tree mask of a step, by row."""

    words: Int32[Array, "padded_tokens words"]
    """`RaggedBatch.tree_mask`, padded as q is."""
    first_new: Int32[Array, " seqs"]
    """The position of each sequence's first new token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WalkWork:
    """What every layer's walk needs from a batch."""

    lists: tuple[tuple[WorkList, Int32[Array, ""]], ...]
    """For each entry of `WalkConfig.tile_rows`, the tiles and their number."""
    tree: TreeRows | None


def fit(call: AttentionCall, block_sizes: BlockSizes | None) -> WalkConfig:
    """Returns the sizes of the walk for these shapes.

    Raises:
        NotImplementedError: q or the pages are float64.
    """
    for name, dtype in (("q", call.q.dtype), ("pages", call.pages.dtype)):
        if dtype == jnp.float64:
            raise NotImplementedError(
                f"{name} has dtype float64; the xla backend computes in float32: cast it, or use backend='reference'"
            )
    tokens, max_q_len = call.q.shape[0], call.batch.max_q_len
    blocks = block_sizes or default_block_sizes(call.pages)
    return WalkConfig(
        spec=call.spec,
        tokens=tokens,
        page_size=call.pages.page_size,
        q_rows=max(1, min(blocks.q_rows, tokens, max_q_len or tokens)),
        kv_pages=blocks.kv_pages,
        decode=max_q_len == 1,
    )


def default_block_sizes(pages: KVPages) -> BlockSizes:
    """Returns 64 rows, and pages for at most 256 keys. A block of 2 MiB in float32 fits in the CPU's cache."""
    key_bytes = 4 * pages.num_kv_heads * (pages.head_dim + pages.v_head_dim)
    keys = min(DEFAULT_KEYS, MOST_BLOCK_BYTES // key_bytes)
    return BlockSizes(q_rows=DEFAULT_Q_ROWS, kv_pages=max(1, keys // pages.page_size))


def prepare(batch: RaggedBatch, config: WalkConfig) -> WalkWork:
    """Returns the work lists of a step."""
    c = config
    lists = tuple(
        make_work_list(batch, c.spec, tokens=c.tokens, page_size=c.page_size, q_rows=q_rows, single_rows=index == 0)
        for index, q_rows in enumerate(c.tile_rows)
    )
    tree = None
    if batch.tree_mask is not None:
        tree = TreeRows(words=pad_rows(batch.tree_mask, c), first_new=batch.first_positions)
    return WalkWork(lists=lists, tree=tree)


def pad_rows(rows: Shaped[Array, "tokens ..."], config: WalkConfig) -> Shaped[Array, "padded_tokens ..."]:
    """Returns the rows with padding, because the last tile may extend past the end."""
    return jnp.pad(rows, ((0, config.q_rows - 1), *[(0, 0)] * (rows.ndim - 1)))
