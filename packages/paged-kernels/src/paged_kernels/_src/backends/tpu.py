"""The Pallas TPU kernels (docs/kernels/attention.md, docs/kernels/page_write.md)."""

import dataclasses
import functools
from typing import Any

from jaxtyping import Array, Float

from paged_kernels._src.attention.block_sizes import BlockSizes
from paged_kernels._src.attention.tpu import launch
from paged_kernels._src.attention.tpu.fit import LaunchConfig, fit
from paged_kernels._src.attention.tpu.prepare import AttentionWork, prepare
from paged_kernels._src.backends.base import Backend, PreparedBatch, without_gradient
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.call import AttentionCall, WriteCall
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.page_write.tpu import launch as page_write
from paged_kernels._src.tpu.interpreter import Interpret


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuBackend(Backend):
    """Kernels for float32, bfloat16 and quantised pages. No gradients."""

    name: str = "tpu"
    platforms: tuple[str, ...] | None = ("tpu",)
    block_sizes: BlockSizes | None = None
    """The block sizes of attention; `None` uses the default for the chip."""
    interpret: Interpret = False
    """The parameters of Pallas's TPU interpreter; `False` compiles."""

    def with_block_sizes(self, *, q_rows: int, kv_pages: int) -> "TpuBackend":
        """See `Backend.with_block_sizes`."""
        return dataclasses.replace(self, block_sizes=BlockSizes(q_rows=q_rows, kv_pages=kv_pages))

    def fit_attention(self, call: AttentionCall) -> LaunchConfig:
        """See `Backend.fit_attention`."""
        return fit(call, self.block_sizes)

    def prepare_attention(self, batch: RaggedBatch, fitted: LaunchConfig) -> AttentionWork:
        """See `Backend.prepare_attention`."""
        return prepare(batch, fitted)

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
        config = prepared.fitted.attention
        attend = functools.partial(launch.attend, config=config, interpret=self.interpret, return_lse=return_lse)
        return without_gradient(self.name, attend)(q, pages, prepared.attention, head_params)

    def fit_write(self, call: WriteCall) -> page_write.WriteConfig:
        """See `Backend.fit_write`."""
        return page_write.fit(call)

    def prepare_write(self, batch: RaggedBatch, fitted: page_write.WriteConfig) -> Any:
        """See `Backend.prepare_write`."""
        return page_write.prepare(batch, fitted)

    def write(
        self,
        pages: KVPages,
        k: Float[Array, "tokens kv_heads head_dim"],
        v: Float[Array, "tokens kv_heads v_head_dim"] | None,
        prepared: PreparedBatch,
    ) -> KVPages:
        """See `Backend.write`."""
        write = functools.partial(page_write.write, config=prepared.fitted.write, interpret=self.interpret)
        return without_gradient(self.name, write)(pages, k, v, prepared.write)


BACKEND = TpuBackend()
