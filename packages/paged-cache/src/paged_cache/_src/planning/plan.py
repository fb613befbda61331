"""How many pages, sequences and tokens fit into a budget of bytes."""

import bisect
import dataclasses
import math

import jax.numpy as jnp
from jax.typing import DTypeLike

from paged_cache._src.cache.config import MAX_SIZE, MIN_PAGES, CacheConfig
from paged_cache._src.cache.sharding import kv_heads_per_device
from paged_cache._src.manager.groups import LayerGroup
from paged_cache._src.manager.sequences import check_integer
from paged_cache._src.planning.cache_spec import CacheSpec
from paged_kernels import KVLayout, KVPages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a cache of `memory_bytes` on each device holds; made by `plan`, which says what the fields are.

    All layers' pages come from one pool (`groups`): a page takes room in as many layers as the largest group has,

        bytes_per_page = layers of the largest group * KVPages.bytes_per_page(...)
        num_pages = memory_bytes // bytes_per_page           one of them the null page
    """

    shape: CacheSpec
    memory_bytes: int
    page_size: int
    dtype: str
    tensor_parallel: int
    chunk: int

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The groups of layers to give to a `PageManager`."""
        return self.shape.equal_groups()

    @property
    def kv_heads_per_device(self) -> int:
        """KV heads on each device: its part, or all of them where `tensor_parallel` does not divide them."""
        return kv_heads_per_device(self.shape.num_kv_heads, self.tensor_parallel)

    @property
    def layers_per_page(self) -> int:
        """Layers in which a page takes room: the number of the cache's views."""
        return max(len(group.layers) for group in self.groups)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of a page on each device: keys, values, scales and padding."""
        shape = self.shape
        one_layer = KVPages.bytes_per_page(
            self.page_size,
            self.kv_heads_per_device,
            shape.head_dim,
            self.dtype,
            v_head_dim=shape.v_head_dim,
            latent=shape.latent,
        )
        return one_layer * self.layers_per_page

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
        """Tokens whose keys and values fit, each in all layers: as if no window ever let go of one."""
        return self.usable_pages // len(self.groups) * self.page_size

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token in all layers on each device; a page's, divided by the tokens in it."""
        return self.bytes_per_page * len(self.groups) / self.page_size

    @property
    def number_bytes_per_token(self) -> float:
        """Bytes of the stored numbers of one token's keys and values on each device, bare."""
        row = self._layout
        dims = row.k_dim if row.latent else row.k_dim + row.v_dim
        bits = jnp.iinfo(self.dtype).bits if self.dtype.startswith("int") else jnp.finfo(self.dtype).bits
        return self.shape.num_layers * self.kv_heads_per_device * dims * bits / 8

    @property
    def scale_bytes_per_token(self) -> int:
        """Bytes of the scales of one token's keys and values on each device, bare."""
        scales = self.shape.num_layers * self.kv_heads_per_device * self._layout.scales_per_entry
        return scales * jnp.dtype(jnp.float32).itemsize

    @property
    def padding_bytes_per_token(self) -> float:
        """What is left of `bytes_per_token`: rows and scales padded to 128 lanes, groups with too few layers."""
        return self.bytes_per_token - self.number_bytes_per_token - self.scale_bytes_per_token

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that fits alone; at most 2**31 - 1, which windows alone may never fill."""
        lengths = range(1, MAX_SIZE + 1)
        return bisect.bisect_right(lengths, self.usable_pages, key=lambda length: self.pages_of(length, self.chunk))

    def sequences(self, context: int) -> int:
        """Sequences that fit, each grown to `context` tokens, with no page in common.

        All of them decode, and the last one could still be admitted, in chunks of `chunk` tokens, when the others
        were that long.

        Raises:
            ValueError: `context` is below 1.
        """
        context = check_integer("context", context, 1)
        admitting, decoding = self.pages_of(context, self.chunk), self.pages_of(context, 1)
        return 0 if admitting > self.usable_pages else 1 + (self.usable_pages - admitting) // decoding

    def pages_of(self, length: int, new_tokens: int) -> int:
        """Pages that a sequence of at most `length` tokens holds at most, given at most `new_tokens` in a step."""
        return sum(most_pages(group, length, new_tokens, self.page_size) for group in self.groups)

    def cache_config(self, *, max_seqs: int, max_sequence_length: int) -> CacheConfig:
        """The sizes of this cache, to allocate it with; its layers are the views that the groups share."""
        shape = self.shape
        return CacheConfig(
            num_hidden_layers=self.layers_per_page,
            num_pages=self.num_pages,
            page_size=self.page_size,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            max_sequence_length=max_sequence_length,
            max_seqs=max_seqs,
            dtype=self.dtype,
            v_head_dim=shape.v_head_dim,
            latent=shape.latent,
        )

    @property
    def _layout(self) -> KVLayout:
        shape = self.shape
        return KVLayout.create(shape.head_dim, self.dtype, v_head_dim=shape.v_head_dim, latent=shape.latent)


def plan(
    shape: CacheSpec,
    memory_bytes: int,
    *,
    page_size: int = 16,
    dtype: DTypeLike = "bfloat16",
    tensor_parallel: int = 1,
    chunk: int = 512,
) -> Plan:
    """What fits into `memory_bytes` of each device. Touches no device.

    >>> llama_3_8b = CacheSpec(groups=(LayerGroup.full(range(32)),), num_kv_heads=8, head_dim=128)
    >>> fits = plan(llama_3_8b, 16 * 2**30)
    >>> fits.bytes_per_token, fits.num_pages, fits.sequences(8192), fits.longest_sequence
    (131072.0, 8192, 15, 131056)

    Args:
        shape: of the model.
        memory_bytes: bytes of each device for the pages of all layers.
        page_size: tokens a page holds.
        dtype: type of the stored keys and values, with scales or without.
        tensor_parallel: devices that KV heads are split over.
        chunk: most tokens of a prompt that one step is given; what a window keeps depends on it.

    Raises:
        ValueError: a size is below 1, `dtype` is no type that pages can have, or not even the null page and one more
            fit.
    """
    sizes = {"memory_bytes": memory_bytes, "page_size": page_size, "tensor_parallel": tensor_parallel, "chunk": chunk}
    sizes = {name: check_integer(name, size, 1) for name, size in sizes.items()}
    made = Plan(shape=shape, dtype=jnp.dtype(dtype).name, **sizes)
    if made.num_pages < MIN_PAGES:
        raise ValueError(
            f"memory_bytes={memory_bytes:,} must hold the null page and one more, which need "
            f"{MIN_PAGES * made.bytes_per_page:,} bytes; use a smaller page_size or dtype, or more devices"
        )
    return made


def most_pages(group: LayerGroup, length: int, new_tokens: int, page_size: int) -> int:
    """Pages that a group holds at most for a sequence of up to `length` tokens that gets `new_tokens` a step.

    With `n` tokens computed and `q <= new_tokens` being computed, pages hold positions `first_needed(n) .. n + q - 1`:

        full      from 0                                           all `length` of them
        window    from n - tokens + 1, so anywhere in a page       tokens - 1 + q positions
        chunked   from a multiple of `tokens`                      tokens - 1 + q positions at most

    A run of `span` positions that starts at a multiple of `step` starts at most `page_size - gcd(step, page_size)`
    after the start of a page, so it touches at most

        min(ceil(length / page_size), ceil((page_size - gcd(step, page_size) + span) / page_size))

    >>> most_pages(LayerGroup.window(128), length=4096, new_tokens=1, page_size=16)
    9
    """
    all_pages = -(-length // page_size)
    if not group.is_windowed:
        return all_pages
    step = 1 if group.kind == "window" else group.tokens
    span = group.tokens - 1 + new_tokens
    return min(all_pages, -(-(page_size - math.gcd(step, page_size) + span) // page_size))
