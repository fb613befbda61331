"""Where a layer's keys and values lie: the one module that knows the physical order of a page."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

SUPPORTED_DTYPES = ("float32", "bfloat16", "float16", "float64")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVPages:
    """One layer's pages of keys and values.

    `data[page, head, slot]` is the row `K‖V` of one token and one KV head, K and V side by side:

        data  [pages, kv_heads, page_size, 2 * head_dim]
                 page 7, head 2:   slot 0 | k k k k | v v v v |
                                   slot 1 | k k k k | v v v v |

    A page is contiguous over all heads, so that one copy moves it (docs/decisions/0002-page-layout.md).
    Build it with `zeros` or `from_kv`, and read it through `k` and `v`: code above this package never indexes `data`.
    Put another array in its place with `dataclasses.replace(pages, data=...)`, which keeps fields added later.
    """

    data: Array
    """Every page's rows; the leaf to place on devices, donate and alias."""

    @classmethod
    def zeros(
        cls, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike = jnp.bfloat16
    ) -> "KVPages":
        """Pages of zeros. Page 0 is the null page and belongs to nobody.

        >>> KVPages.zeros(num_pages=4, page_size=16, num_kv_heads=2, head_dim=64).k.shape
        (2, 4, 16, 64)

        Raises:
            ValueError: a size is below 1, or `dtype` is not a floating type that pages can have.
            NotImplementedError: `dtype` is a quantised type.
        """
        shape = cls.data_shape(num_pages, page_size, num_kv_heads, head_dim)
        return cls(jnp.zeros(shape, check_dtype(dtype)))

    @classmethod
    def from_kv(
        cls,
        k_pages: Float[Array, "kv_heads pages page_size head_dim"],
        v_pages: Float[Array, "kv_heads pages page_size head_dim"],
    ) -> "KVPages":
        """Pages that hold these keys and values (a copy of both).

        Raises:
            ValueError: the two differ in shape or dtype, or do not have four axes; or as `zeros`.
            NotImplementedError: as `zeros`.
        """
        if k_pages.shape != v_pages.shape or k_pages.ndim != 4:
            raise ValueError(
                f"k_pages {k_pages.shape} and v_pages {v_pages.shape} must have the same shape "
                "[kv_heads, pages, page_size, head_dim]"
            )
        if k_pages.dtype != v_pages.dtype:
            raise ValueError(f"k_pages ({k_pages.dtype}) and v_pages ({v_pages.dtype}) must have the same dtype")
        check_dtype(k_pages.dtype)
        return cls(jnp.swapaxes(jnp.concatenate([k_pages, v_pages], axis=-1), 0, 1))

    @staticmethod
    def data_shape(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, int, int, int]:
        """Shape of `data` for these sizes.

        Raises:
            ValueError: a size is below 1.
        """
        sizes = {"num_pages": num_pages, "page_size": page_size, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        return (num_pages, num_kv_heads, page_size, 2 * head_dim)

    @staticmethod
    def bytes_per_page(page_size: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike) -> int:
        """Bytes of one page of one layer, keys and values together.

        >>> KVPages.bytes_per_page(page_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")
        65536

        Raises:
            ValueError: as `zeros`.
        """
        return int(np.prod(KVPages.data_shape(1, page_size, num_kv_heads, head_dim))) * check_dtype(dtype).itemsize

    @staticmethod
    def partition_spec(
        heads: str | tuple[str, ...] | None, pages: str | tuple[str, ...] | None = None
    ) -> PartitionSpec:
        """How every array in here is split when KV heads (and pages) are split over these mesh axes.

        Pages come first and heads second in each of them, so that this one spec serves the whole pytree.
        """
        return PartitionSpec(pages, heads)

    @property
    def k(self) -> Float[Array, "kv_heads pages page_size head_dim"]:
        """The keys, `[kv_heads, pages, page_size, head_dim]`."""
        return jnp.swapaxes(self.data[..., : self.head_dim], 0, 1)

    @property
    def v(self) -> Float[Array, "kv_heads pages page_size head_dim"]:
        """The values, `[kv_heads, pages, page_size, head_dim]`."""
        return jnp.swapaxes(self.data[..., self.head_dim :], 0, 1)

    @property
    def num_pages(self) -> int:
        """Number of pages, the null page included."""
        return self.data.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """Number of KV heads."""
        return self.data.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens a page holds."""
        return self.data.shape[2]

    @property
    def head_dim(self) -> int:
        """Size of one head's key (and value)."""
        return self.data.shape[3] // 2

    @property
    def dtype(self) -> np.dtype:
        """Type of the stored keys and values."""
        return self.data.dtype

    def take(self, page_ids: Int[Array, "*ids"]) -> Float[Array, "*ids kv_heads page_size two_head_dim"]:
        """The rows `K‖V` of these pages; an id that is no page reads some page, never outside."""
        return self.data.at[page_ids].get(mode="clip")

    def put_rows(
        self,
        page_ids: Int32[Array, " rows"],
        slots: Int32[Array, " rows"],
        kv_rows: Float[Array, "rows kv_heads two_head_dim"],
    ) -> "KVPages":
        """Pages with `kv_rows` (`K‖V`) stored at these slots; a row for page 0 or for no page at all is dropped."""
        drop = (page_ids <= 0) | (page_ids >= self.num_pages)
        page_ids = jnp.where(drop, self.num_pages, page_ids)
        data = self.data.at[page_ids, :, slots].set(kv_rows.astype(self.dtype), mode="drop")
        return dataclasses.replace(self, data=data)


def check_dtype(dtype: DTypeLike) -> np.dtype:
    """`dtype` as numpy's type, if pages can have it.

    Raises:
        ValueError: it is not a floating type.
        NotImplementedError: it is one that needs scales (int8, fp8, int4), which pages do not carry yet.
    """
    resolved = jnp.dtype(dtype)
    if resolved.name in SUPPORTED_DTYPES:
        return resolved
    if resolved.name in ("int8", "int4", "float8_e4m3fn", "float8_e5m2"):
        raise NotImplementedError(f"dtype={resolved.name} needs scales, which pages do not carry yet; use bfloat16")
    raise ValueError(f"dtype={resolved.name} must be one of {', '.join(SUPPORTED_DTYPES)}")
