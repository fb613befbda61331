"""C++ kernels for CPUs, called through XLA's FFI (docs/kernels/cpu.md)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from paged_kernels._src.attention.block_sizes import BlockSizes
from paged_kernels._src.backends.base import Backend, PreparedBatch, without_gradient
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.call import AttentionCall, WriteCall
from paged_kernels._src.cpu import calls, library
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.spec import AttentionSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class CpuBackend(Backend):
    """Takes every call except float64. No gradients, no `vmap`."""

    name: str = "cpu"
    platforms: tuple[str, ...] | None = ("cpu",)
    target: str | None = None
    """The instruction set, one of `library.targets()`; `None` is the best that this processor has."""

    block_sizes: BlockSizes | None = None
    """The rows of a block and the pages of a chunk; `None` lets the library choose for each batch."""

    def with_block_sizes(self, *, q_rows: int, kv_pages: int) -> "CpuBackend":
        """See `Backend.with_block_sizes`."""
        return dataclasses.replace(self, block_sizes=BlockSizes(q_rows=q_rows, kv_pages=kv_pages))

    def fit_attention(self, call: AttentionCall) -> AttentionSpec:
        """See `Backend.fit_attention`."""
        library.load()
        _refuse_float64(q=call.q.dtype, pages=call.pages.dtype)
        return call.spec

    def prepare_attention(self, batch: RaggedBatch, fitted: AttentionSpec) -> None:
        """Returns None: each call makes its work list from the batch, which takes microseconds."""

    def attend(
        self,
        q: Float[Array, "tokens q_heads head_dim"],
        pages: KVPages,
        prepared: PreparedBatch,
        head_params: HeadParams,
        *,
        return_lse: bool,
    ) -> tuple[Float[Array, "tokens q_heads v_head_dim"], Float[Array, "tokens q_heads"] | None]:
        """See `Backend.attend`."""
        attend = functools.partial(
            calls.attend,
            spec=prepared.fitted.attention,
            return_lse=return_lse,
            block_sizes=self.block_sizes,
            target=self.target,
        )
        return _without_transforms(self.name, attend)(q, pages, prepared.batch, head_params)

    def fit_write(self, call: WriteCall) -> WriteCall:
        """See `Backend.fit_write`."""
        library.load()
        _refuse_float64(pages=call.pages.dtype)
        return call

    def write(
        self,
        pages: KVPages,
        k: Float[Array, "tokens kv_heads head_dim"],
        v: Float[Array, "tokens kv_heads v_head_dim"] | None,
        prepared: PreparedBatch,
    ) -> KVPages:
        """See `Backend.write`. Rows of float64 are written by XLA."""
        if k.dtype == jnp.float64:
            return super().write(pages, k, v, prepared)
        return _without_transforms(self.name, calls.write)(pages, k, v, *prepared.write)


def _without_transforms(backend: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `fn`, but a gradient and `jax.vmap` raise errors that name the backend."""
    refusing = custom_vmap(fn)

    @refusing.def_vmap
    def refuse(axis_size, in_batched, *arguments):
        raise NotImplementedError(
            f"backend={backend!r} has no vmap; put the sequences into one RaggedBatch, or use backend='xla'"
        )

    return without_gradient(backend, refusing)


def _refuse_float64(**dtypes: Any) -> None:
    for name, dtype in dtypes.items():
        if dtype == jnp.float64:
            raise NotImplementedError(
                f"{name} has dtype float64; the cpu backend computes in float32: cast it, or use backend='reference'"
            )


BACKEND = CpuBackend()
