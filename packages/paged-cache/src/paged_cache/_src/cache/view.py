"""One view of the cache: its pages, how they are split over the mesh, and the one function that writes them."""

import dataclasses

import jax
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from paged_cache._src.cache.sharding import MeshAxis, axis_size, sharded_call
from paged_cache._src.easydel import PagedAttentionMetadata
from paged_kernels import Backend, KVPages, RaggedBatch, check_batch, write_kv


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedAttentionCacheView:
    """The KV pages of one layer, or of layers that share a view. A write returns a new view; the old one is unchanged.

    With `data_axis` set, the page axis is split over that mesh axis: each of its `replicas` holds a pool of
    `num_pages / replicas` pages with a null page 0 of its own, and page ids count from the replica's first page.
    """

    pages: KVPages
    """Keys, values and their scales."""
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})
    """The devices that share the pages; `None` for a single device."""
    head_axis: MeshAxis | None = dataclasses.field(default=None, metadata={"static": True})
    """Mesh axis over which KV heads are split; `None`: every device holds all heads."""
    data_axis: str | None = dataclasses.field(default=None, metadata={"static": True})
    """Mesh axis over which pages are split, for data parallelism; `None`: one pool."""

    def __post_init__(self) -> None:
        if self.mesh is None and (self.head_axis or self.data_axis):
            raise ValueError(
                f"head_axis={self.head_axis!r} and data_axis={self.data_axis!r} name axes of a mesh, but mesh is None; "
                "pass the mesh, or leave both out"
            )

    @property
    def key_pages(self) -> Float[Array, "kv_heads pages page_size head_dim"]:
        """The keys, `[kv_heads, pages, page_size, head_dim]`; float32 where they are quantised."""
        return self.pages.k

    @property
    def value_pages(self) -> Float[Array, "kv_heads pages page_size v_head_dim"]:
        """The values, `[kv_heads, pages, page_size, v_head_dim]`; float32 where they are quantised."""
        return self.pages.v

    @property
    def replicas(self) -> int:
        """Number of data-parallel replicas, each with a pool of its own."""
        return 1 if self.mesh is None else axis_size(self.mesh, self.data_axis)

    @property
    def pages_spec(self) -> PartitionSpec:
        """How the pages are split over the mesh."""
        return KVPages.partition_spec(self.head_axis, self.data_axis)

    @property
    def rows_spec(self) -> PartitionSpec:
        """How the rows of k and v are split: `[tokens, heads, head_dim]`, or with a leading `[replicas]` axis."""
        rows = (None, self.head_axis, None)
        return PartitionSpec(*rows) if self.data_axis is None else PartitionSpec(self.data_axis, *rows)

    @property
    def batch_spec(self) -> PartitionSpec:
        """How a batch is split: replicated, or one stacked batch a replica."""
        return PartitionSpec() if self.data_axis is None else PartitionSpec(self.data_axis)

    def write(
        self,
        key: Float[Array, "*replicas tokens kv_heads head_dim"],
        value: Float[Array, "*replicas tokens kv_heads v_head_dim"] | None,
        batch: RaggedBatch,
        *,
        backend: str | Backend | None = None,
    ) -> "PagedAttentionCacheView":
        """The view with the batch's new keys and values stored at their tokens' positions, in the pages' type.

        Latent pages take their values from `key`, and `value` must be `None`. Gaps (idle sequences) and padding
        write nothing. With `data_axis`, every argument has a leading `[replicas]` axis (`stack_batches`). Inside
        `jax.jit` with the view donated, nothing is copied.

        Raises:
            ValueError: an argument does not fit the pages or the others, or the view was donated to an earlier call.
                Values of the batch (page ids, lengths) are checked where they are concrete, that is in eager code.
        """
        self.pages.check_not_donated("view.pages")
        self._check_rows(key, value)
        self.check_batch(batch, key.shape[-3], sliding_window=1)  # only the pages of its own rows are written
        return dataclasses.replace(self, pages=self._write_pages(key, value, batch, backend))

    def write_prefill_to_cache(
        self,
        key: Float[Array, "*one tokens kv_heads head_dim"],
        value: Float[Array, "*one tokens kv_heads v_head_dim"] | None,
        metadata: PagedAttentionMetadata,
    ) -> "PagedAttentionCacheView":
        """The view with one prompt's chunk stored: `[1, tokens, heads, head_dim]`, or without the first axis.

        Row `j` goes to position `prefill_position[0] + j`; rows past the prompt's end are not written. The decode
        part of mixed metadata is not written.

        Raises:
            ValueError: the metadata has no prefill part, or an argument does not fit.
        """
        part = metadata.prefill_part()
        key, value = _drop_axis("key", key, 0), None if value is None else _drop_axis("value", value, 0)
        _check_row_count(key, part.prefill_position, "prefill")
        return self.write(key, value, part.to_ragged_batch())

    def write_decodes_to_cache(
        self,
        key: Float[Array, "seqs *one kv_heads head_dim"],
        value: Float[Array, "seqs *one kv_heads v_head_dim"] | None,
        metadata: PagedAttentionMetadata,
    ) -> "PagedAttentionCacheView":
        """The view with each decoding sequence's token stored: `[seqs, 1, heads, head_dim]`, or without the axis of 1.

        Sequence `i` writes position `decodes_position[i]`; an idle sequence (-1) writes nowhere. The prefill part of
        mixed metadata is not written.

        Raises:
            ValueError: the metadata has no decode part, or an argument does not fit.
        """
        part = metadata.decode_part()
        key, value = _drop_axis("key", key, 1), None if value is None else _drop_axis("value", value, 1)
        _check_row_count(key, part.decodes_position, "decode")
        return self.write(key, value, part.to_ragged_batch())

    def check_batch(
        self, batch: RaggedBatch, tokens: int, sliding_window: int | None = None, *, writes: bool = True
    ) -> None:
        """Refuse page ids and lengths that do not fit the pages or the `tokens` rows; traced values are not checked.

        Call it on the host, before the values are traced. Each batch of a stacked one is checked. With a
        `sliding_window`, pages that no row sees may be the null page. With `writes`, no two rows may have one slot.

        Raises:
            ValueError: names the field and the sequence, what it is, and what it must be.
        """
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(batch)):
            return
        batches = [batch] if self.data_axis is None else _unstack(batch, self.replicas)
        for each in batches:
            check_batch(
                each,
                num_pages=self.pages.num_pages // self.replicas,
                page_size=self.pages.page_size,
                tokens=tokens,
                sliding_window=sliding_window,
                writes=writes,
            )

    def _write_pages(
        self, key: Array, value: Array | None, batch: RaggedBatch, backend: str | Backend | None
    ) -> KVPages:
        if self.mesh is None:
            return write_kv(self.pages, key, value, batch, backend=backend)

        def write_part(pages: KVPages, key: Array, value: Array | None, batch: RaggedBatch) -> KVPages:
            if self.data_axis is not None:  # each device sees the one batch of its replica
                key, value, batch = jax.tree.map(lambda leaf: leaf[0], (key, value, batch))
            return write_kv(pages, key, value, batch, backend=backend)

        in_specs = (self.pages_spec, self.rows_spec, self.rows_spec, self.batch_spec)
        return sharded_call(write_part, self.mesh, in_specs, self.pages_spec, self.pages, key, value, batch)

    def _check_rows(self, key: Array, value: Array | None) -> None:
        """Refuse rows of the wrong shape. `shard_map` could not: it sees only a device's part of each array."""
        if (value is None) != self.pages.layout.latent:
            needs = "None for latent pages, whose values are in their keys" if self.pages.layout.latent else "given too"
            raise ValueError(f"value must be {needs}")
        lead = () if self.data_axis is None else (self.replicas,)
        tokens = key.shape[-3] if key.ndim >= 3 else -1
        names = "[replicas, tokens, kv_heads, head_dim]" if lead else "[tokens, kv_heads, head_dim]"
        for name, rows, dim in (("key", key, self.pages.head_dim), ("value", value, self.pages.v_head_dim)):
            if rows is not None and rows.shape != (*lead, tokens, self.pages.num_kv_heads, dim):
                shape = ", ".join(map(str, [*lead, "tokens", self.pages.num_kv_heads, dim]))
                raise ValueError(f"{name} {rows.shape} must be {names} = [{shape}], both of the same number of tokens")


def _drop_axis(name: str, rows: Array, axis: int) -> Array:
    """`rows` without EasyDeL's axis of size 1, which may be absent."""
    if rows.ndim == 3:
        return rows
    if rows.ndim != 4 or rows.shape[axis] != 1:
        raise ValueError(f"{name} {rows.shape} must have 3 axes, or 4 of which axis {axis} has size 1")
    return rows.squeeze(axis)


def _check_row_count(key: Array, positions: Array | None, part: str) -> None:
    if positions is not None and key.shape[0] != positions.shape[0]:
        raise ValueError(f"key has {key.shape[0]} rows, but the {part} part has {positions.shape[0]}; they must match")


def _unstack(batch: RaggedBatch, replicas: int) -> list[RaggedBatch]:
    for leaf in jax.tree.leaves(batch):
        if leaf.ndim == 0 or leaf.shape[0] != replicas:
            raise ValueError(f"batch must be stacked, one for each of {replicas} replicas; use stack_batches")
    return [jax.tree.map(lambda leaf, g=group: leaf[g], batch) for group in range(replicas)]
