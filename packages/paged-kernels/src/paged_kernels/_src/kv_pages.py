"""The pages of a layer's keys and values. Only this module knows the physical order of a page."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32, Shaped

from paged_kernels._src.donation import check_not_donated
from paged_kernels._src.kv_layout import KVLayout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVPages:
    """One layer's pages of keys and values.

    `data[page, head, slot]` is the entry of one token and one KV head, with K and V side by side (`KVLayout`):

        data   [pages, kv_heads, page_size, storage_lanes]
                  page 7, head 2:   slot 0 | k k k k | v v v v |
                                    slot 1 | k k k k | v v v v |
        scales [pages, kv_heads, 1, scale_lanes]
                  page 7, head 2:   | k0 k1 ... v0 v1 ... . . |     zeros up to a whole register

    A page is contiguous over all heads, so one copy moves it (docs/decisions/0002-page-layout.md). Build pages with
    `zeros` or `from_kv`, and read them through `k` and `v`. Code outside this package must not index `data`. To replace
    an array, use `dataclasses.replace(pages, data=...)`, which keeps the other fields.
    """

    data: Array
    """The entries of all pages. As a pytree leaf it can be placed on devices, donated and aliased."""
    scales: Array | None = None
    """The scales of quantised entries, float32: K's for each slot, then V's. A latent entry has one scale.

    The last axis has whole registers of 32-bit lanes. XLA would store a smaller axis in another order, and would copy
    all of it at each kernel call.
    """
    layout: KVLayout = dataclasses.field(metadata={"static": True})
    """The layout of an entry."""

    @classmethod
    def zeros(
        cls,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: DTypeLike = jnp.bfloat16,
        *,
        v_head_dim: int | None = None,
        latent: bool = False,
    ) -> "KVPages":
        """Returns pages of zeros. Page 0 is the null page, which no sequence uses.

        >>> KVPages.zeros(num_pages=4, page_size=16, num_kv_heads=2, head_dim=64).k.shape
        (2, 4, 16, 64)

        Args:
            num_pages: the number of pages, the null page included.
            page_size: tokens per page.
            num_kv_heads: KV heads; 1 for latent entries.
            head_dim: the size of a key.
            dtype: float32, bfloat16, float16, float64, or a type with scales: int8, float8_e4m3fn, float8_e5m2, int4.
            v_head_dim: the size of a value; `None` means `head_dim`.
            latent: True if V is the start of K and is not stored again (multi-head latent attention).

        Raises:
            ValueError: a size is below 1, or pages cannot have this `dtype`.
        """
        shapes = cls.shapes(num_pages, page_size, num_kv_heads, head_dim, dtype, v_head_dim=v_head_dim, latent=latent)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    @classmethod
    def shapes(
        cls,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: DTypeLike = jnp.bfloat16,
        *,
        v_head_dim: int | None = None,
        latent: bool = False,
    ) -> "KVPages":
        """Like `zeros`, with a `jax.ShapeDtypeStruct` for each array: for compiling and for counting bytes."""
        layout = KVLayout.create(head_dim, dtype, v_head_dim=v_head_dim, latent=latent)
        for name, size in {"num_pages": num_pages, "page_size": page_size, "num_kv_heads": num_kv_heads}.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        scales = (num_pages, num_kv_heads, 1, layout.scale_lanes(page_size))
        array: Any = jax.ShapeDtypeStruct  # in place of an array
        return cls(
            data=array((num_pages, num_kv_heads, page_size, layout.storage_lanes), layout.storage_dtype),
            scales=array(scales, jnp.float32) if layout.is_quantised else None,
            layout=layout,
        )

    @classmethod
    def from_kv(
        cls,
        k_pages: Float[Array, "kv_heads pages page_size head_dim"],
        v_pages: Float[Array, "kv_heads pages page_size v_head_dim"] | None,
        dtype: DTypeLike | None = None,
    ) -> "KVPages":
        """Returns pages with a copy of these keys and values, rounded to `dtype`; `None` keeps their type.

        Without `v_pages` the entries are latent: each key is its own value.

        Raises:
            ValueError: the two differ in dtype or in one of their first three axes, or do not have four axes.
        """
        if k_pages.ndim != 4:
            raise ValueError(f"k_pages {k_pages.shape} must be [kv_heads, pages, page_size, head_dim]")
        if v_pages is not None and k_pages.shape[:3] != v_pages.shape[:3]:
            raise ValueError(f"k_pages {k_pages.shape} and v_pages {v_pages.shape} must have the same first three axes")
        if v_pages is not None and k_pages.dtype != v_pages.dtype:
            raise ValueError(f"k_pages ({k_pages.dtype}) and v_pages ({v_pages.dtype}) must have the same dtype")
        layout = KVLayout.create(
            k_pages.shape[-1],
            k_pages.dtype if dtype is None else dtype,
            v_head_dim=None if v_pages is None else v_pages.shape[-1],
            latent=v_pages is None,
        )
        v = None if v_pages is None else jnp.swapaxes(v_pages, 0, 1)
        return cls.from_entries(*layout.pack(jnp.swapaxes(k_pages, 0, 1), v), layout)

    @classmethod
    def from_entries(
        cls,
        entries: Shaped[Array, "pages kv_heads page_size storage_lanes"],
        scales: Float[Array, "pages kv_heads page_size kinds"] | None,
        layout: KVLayout,
    ) -> "KVPages":
        """Returns pages from entries and scales, as `KVLayout.pack` and `take` return them."""
        if scales is not None:
            scales = jnp.swapaxes(scales, 2, 3).reshape(*scales.shape[:2], 1, -1)
            padding = layout.scale_lanes(entries.shape[2]) - scales.shape[3]
            scales = jnp.pad(scales, ((0, 0), (0, 0), (0, 0), (0, padding)))
        return cls(data=entries, scales=scales, layout=layout)

    @staticmethod
    def bytes_per_page(
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: DTypeLike,
        *,
        v_head_dim: int | None = None,
        latent: bool = False,
    ) -> int:
        """Returns the bytes of one page of one layer: keys, values and their scales.

        >>> KVPages.bytes_per_page(page_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")
        65536

        Raises:
            ValueError: see `zeros`.
        """
        page = KVPages.shapes(1, page_size, num_kv_heads, head_dim, dtype, v_head_dim=v_head_dim, latent=latent)
        return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(page))

    @staticmethod
    def partition_spec(
        heads: str | tuple[str, ...] | None, pages: str | tuple[str, ...] | None = None
    ) -> PartitionSpec:
        """Returns the spec of every array in here, if KV heads (and pages) are split over these mesh axes.

        In each array pages are the first axis and heads the second. So one spec serves the whole pytree.
        """
        return PartitionSpec(pages, heads)

    @property
    def k(self) -> Float[Array, "kv_heads pages page_size head_dim"]:
        """The keys, `[kv_heads, pages, page_size, head_dim]`; float32 if they are quantised."""
        return self._kv()[0]

    @property
    def v(self) -> Float[Array, "kv_heads pages page_size v_head_dim"]:
        """The values, `[kv_heads, pages, page_size, v_head_dim]`; float32 if they are quantised."""
        return self._kv()[1]

    @property
    def num_pages(self) -> int:
        """The number of pages, the null page included."""
        return self.data.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """The number of KV heads."""
        return self.data.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.data.shape[2]

    @property
    def head_dim(self) -> int:
        """The size of a key."""
        return self.layout.k_dim

    @property
    def v_head_dim(self) -> int:
        """The size of a value."""
        return self.layout.v_dim

    @property
    def dtype(self) -> np.dtype:
        """The type of the keys and values; `int4` if two are stored in a byte."""
        return jnp.dtype(self.layout.dtype)

    def check_not_donated(self, name: str = "pages") -> None:
        """Check that these pages can still be used. Traced arrays are not checked.

        Raises:
            ValueError: they were donated to an earlier call. The message calls them `name`.
        """
        check_not_donated(name, self)

    def take(
        self, page_ids: Int[Array, "*ids"]
    ) -> tuple[
        Shaped[Array, "*ids kv_heads page_size storage_lanes"], Float[Array, "*ids kv_heads page_size kinds"] | None
    ]:
        """Returns the entries and scales of these pages, for `KVLayout.unpack`. Ids out of range are clipped."""
        scales = self.scales
        if scales is not None:
            scales = self._scales_by_slot(scales.at[page_ids].get(mode="clip"))
        return self.data.at[page_ids].get(mode="clip"), scales

    def put_entries(
        self,
        page_ids: Int32[Array, " rows"],
        slots: Int32[Array, " rows"],
        k: Float[Array, "rows kv_heads head_dim"],
        v: Float[Array, "rows kv_heads v_head_dim"] | None,
    ) -> "KVPages":
        """Returns pages with these keys and values in these slots. Rows for page 0 or for no page are dropped."""
        entries, scales = self.layout.pack(k, v)
        data = self.data.at[self._drop_unwritable(page_ids), :, slots].set(entries, mode="drop")
        return dataclasses.replace(self, data=data, scales=self._put_scales(page_ids, slots, scales))

    def _put_scales(
        self,
        page_ids: Int32[Array, " rows"],
        slots: Int32[Array, " rows"],
        scales: Float[Array, "rows kv_heads kinds"] | None,
    ) -> Array | None:
        """Returns `self.scales` with these at these slots, or `None` without scales."""
        if self.scales is None or scales is None:
            return self.scales
        kinds = jnp.arange(self.layout.scales_per_entry, dtype=slots.dtype)
        lanes = slots[:, None] + self.page_size * kinds[None]  # [rows, kinds]
        at = self.scales.at[self._drop_unwritable(page_ids)[:, None], :, 0, lanes]
        return at.set(jnp.swapaxes(scales, 1, 2), mode="drop")

    def _drop_unwritable(self, page_ids: Int32[Array, " rows"]) -> Int32[Array, " rows"]:
        """Replaces ids of pages that must not be written by an id out of bounds, which scatters drop."""
        return jnp.where((page_ids > 0) & (page_ids < self.num_pages), page_ids, self.num_pages)

    def _kv(self) -> tuple[Array, Array]:
        scales = None if self.scales is None else self._scales_by_slot(self.scales)
        k, v = self.layout.unpack(self.data, scales)
        return jnp.swapaxes(k, 0, 1), jnp.swapaxes(v, 0, 1)

    def _scales_by_slot(self, scales: Array) -> Array:
        """Reshapes `[..., 1, scale_lanes]` to `[..., page_size, kinds]`."""
        kinds, size = self.layout.scales_per_entry, self.page_size
        return jnp.swapaxes(scales[..., 0, : kinds * size].reshape(*scales.shape[:-2], kinds, size), -1, -2)
