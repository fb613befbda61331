"""How many pages, sequences and tokens fit into a budget of bytes."""

import bisect
import collections
import dataclasses
import functools

import jax.numpy as jnp
from jax.typing import DTypeLike

from paged_cache._src.cache.config import MAX_SIZE, CacheConfig, as_dtype, bytes_per_page, layout_of
from paged_cache._src.cache.fitting import MIN_PAGES
from paged_cache._src.cache.sharding import kv_heads_per_device
from paged_cache._src.manager.groups import KVShape, LayerGroup
from paged_cache._src.manager.sequences import check_integer
from paged_cache._src.spec.cache_spec import CacheSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a cache of `memory_bytes` on each device holds. `plan` makes it, and says what the fields are.

    The pages of all groups come from one pool, and each page takes room in every view (`CacheSpec.views`):

        bytes_per_page = sum of KVPages.bytes_per_page(...) over the views
        num_pages = memory_bytes // bytes_per_page           one of them the null page
    """

    spec: CacheSpec
    memory_bytes: int
    page_size: int
    dtype: str
    tensor_parallel: int
    chunk: int

    @functools.cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The groups of layers to give to a `PageManager`."""
        return self.spec.pool_groups()

    @property
    def views(self) -> tuple[KVShape, ...]:
        """What each view stores on each device: its part of the heads, or all heads if they cannot be divided."""
        return tuple(map(self._on_device, self.spec.views()))

    @functools.cached_property
    def bytes_per_page(self) -> int:
        """Bytes of a page on each device, in all views: keys, values, scales and padding."""
        counts = collections.Counter(self.spec.views())
        return sum(
            count * bytes_per_page(self._on_device(shape), self.page_size, self.dtype)
            for shape, count in counts.items()
        )

    @property
    def num_pages(self) -> int:
        """Pages that fit, the null page included: `CacheConfig.num_pages`."""
        return self.memory_bytes // self.bytes_per_page

    @property
    def usable_pages(self) -> int:
        """Pages that sequences can have."""
        return self.num_pages - 1

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values fit in all layers, if windows release none of them."""
        return self.usable_pages // len(self.groups) * self.page_size

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token in all layers on each device: those of a page of each group, divided by its tokens."""
        return self.bytes_per_page * len(self.groups) / self.page_size

    @property
    def number_bytes_per_token(self) -> float:
        """Bytes of the stored numbers of one token's keys and values on each device, without padding."""
        return sum(count * self._number_bytes(shape) for shape, count in self._stored.items())

    @property
    def scale_bytes_per_token(self) -> int:
        """Bytes of the scales of one token's keys and values on each device, without padding."""
        scales = sum(
            count * shape.num_kv_heads * layout_of(shape, self.dtype).scales_per_entry
            for shape, count in self._stored.items()
        )
        return scales * jnp.dtype(jnp.float32).itemsize

    @property
    def padding_bytes_per_token(self) -> float:
        """The rest of `bytes_per_token`: padding to 128 lanes, and views that a group does not use."""
        return self.bytes_per_token - self.number_bytes_per_token - self.scale_bytes_per_token

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that fits alone; at most 2**31 - 1, which windows alone may never fill."""
        lengths = range(1, MAX_SIZE + 1)
        return bisect.bisect_right(lengths, self.usable_pages, key=lambda length: self.pages_of(length, self.chunk))

    def sequences(self, context: int) -> int:
        """The number of sequences of `context` tokens that fit, if they share no page.

        All of them decode. There is room to admit the last of them in chunks of `chunk` tokens while the others have
        their full length.

        Raises:
            ValueError: `context` is below 1.
        """
        context = check_integer("context", context, 1)
        admitting, decoding = self.pages_of(context, self.chunk), self.pages_of(context, 1)
        return 0 if admitting > self.usable_pages else 1 + (self.usable_pages - admitting) // decoding

    def pages_of(self, length: int, new_tokens: int) -> int:
        """The most pages that a sequence of up to `length` tokens holds, given at most `new_tokens` a step."""
        return sum(group.most_pages(length, new_tokens, self.page_size) for group in self.groups)

    def cache_config(self, *, max_seqs: int, max_sequence_length: int) -> CacheConfig:
        """The sizes of this cache, to allocate it with."""
        return CacheConfig(
            views=self.spec.views(),
            num_pages=self.num_pages,
            page_size=self.page_size,
            max_sequence_length=max_sequence_length,
            max_seqs=max_seqs,
            dtype=self.dtype,
        )

    @property
    def _stored(self) -> collections.Counter[KVShape]:
        """What layers store on each device, and how many layers store that."""
        counts = collections.Counter[KVShape]()
        for group in self.spec.groups:
            if group.kv:
                counts[self._on_device(group.kv)] += len(group.layers)
        return counts

    def _on_device(self, shape: KVShape) -> KVShape:
        heads = kv_heads_per_device(shape.num_kv_heads, self.tensor_parallel)
        return dataclasses.replace(shape, num_kv_heads=heads)

    def _number_bytes(self, shape: KVShape) -> float:
        """Bytes of the numbers that a layer stores for a token."""
        layout = layout_of(shape, self.dtype)
        dims = layout.k_dim if layout.latent else layout.k_dim + layout.v_dim
        bits = jnp.iinfo(layout.dtype).bits if layout.dtype.startswith("int") else jnp.finfo(layout.dtype).bits
        return shape.num_kv_heads * dims * bits / 8


def plan(
    spec: CacheSpec,
    memory_bytes: int,
    *,
    page_size: int = 16,
    dtype: DTypeLike = "bfloat16",
    tensor_parallel: int = 1,
    chunk: int = 512,
) -> Plan:
    """What fits into `memory_bytes` of each device. Touches no device.

    >>> llama_3_8b = CacheSpec.uniform(32, KVShape(num_kv_heads=8, head_dim=128))
    >>> fits = plan(llama_3_8b, 16 * 2**30)
    >>> fits.bytes_per_token, fits.num_pages, fits.sequences(8192), fits.longest_sequence
    (131072.0, 8192, 15, 131056)

    Args:
        spec: what cache the model's layers need.
        memory_bytes: bytes of each device for the pages of all layers.
        page_size: tokens a page holds.
        dtype: type of the stored keys and values, with scales or without.
        tensor_parallel: devices that KV heads are split over.
        chunk: the most tokens of a prompt that one step computes; windowed groups hold more pages for longer chunks.

    Raises:
        ValueError: a size is below 1, `dtype` is no type that pages can have, or not even the null page and one more
            fit.
    """
    sizes = {"memory_bytes": memory_bytes, "page_size": page_size, "tensor_parallel": tensor_parallel, "chunk": chunk}
    sizes = {name: check_integer(name, size, 1) for name, size in sizes.items()}
    made = Plan(spec=spec, dtype=as_dtype(dtype).name, **sizes)
    if made.num_pages < MIN_PAGES:
        raise ValueError(
            f"memory_bytes={memory_bytes:,} must hold the null page and one more, which need "
            f"{MIN_PAGES * made.bytes_per_page:,} bytes; use a smaller page_size or dtype, or more devices"
        )
    return made
