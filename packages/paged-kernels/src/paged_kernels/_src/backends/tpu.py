"""The Pallas TPU kernels (docs/kernels/tpu.md)."""

import dataclasses
from collections.abc import Hashable

from jaxtyping import Array, Float

from paged_kernels._src.attention.block_sizes import BlockSizes
from paged_kernels._src.attention.tpu.launch import fit, paged_attention_tpu
from paged_kernels._src.backends.base import Backend, PreparedBatch, without_gradient
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.call import AttentionCall, WriteCall
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.page_write.tpu.launch import check_supported, write_kv_tpu
from paged_kernels._src.tpu.interpreter import Interpret


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuBackend(Backend):
    """Kernels for float32, bfloat16 and the types with scales. No gradients."""

    name: str = "tpu"
    platforms: tuple[str, ...] | None = ("tpu",)
    block_sizes: BlockSizes | None = None
    """How attention is cut; `None` picks by the chip."""
    interpret: Interpret = False
    """Parameters of Pallas's TPU interpreter; `False` compiles."""

    def with_block_sizes(self, *, q_rows: int, kv_pages: int) -> "TpuBackend":
        """As `Backend.with_block_sizes`."""
        return dataclasses.replace(self, block_sizes=BlockSizes(q_rows=q_rows, kv_pages=kv_pages))

    def fit_attention(self, call: AttentionCall) -> AttentionCall:
        """As `Backend.fit_attention`."""
        fit(call, self.block_sizes)
        return call

    def prepare_attention(self, batch: RaggedBatch, fitted: AttentionCall) -> None:
        """As `Backend.prepare_attention`."""

    def attend(
        self,
        q: Float[Array, "tokens q_heads head_dim"],
        pages: KVPages,
        prepared: PreparedBatch,
        head_params: HeadParams,
        *,
        return_lse: bool,
    ) -> tuple[Float[Array, "tokens q_heads v_head_dim"], Float[Array, "tokens q_heads"] | None]:
        """As `Backend.attend`."""
        spec = prepared.fitted.attention.spec

        @without_gradient(self.name)
        def attend(q, pages, batch, head_params):
            return paged_attention_tpu(
                q,
                pages,
                batch,
                spec,
                head_params,
                block_sizes=self.block_sizes,
                interpret=self.interpret,
                return_lse=return_lse,
            )

        return attend(q, pages, prepared.batch, head_params)

    def fit_write(self, call: WriteCall) -> Hashable:
        """As `Backend.fit_write`."""
        check_supported(call.pages, call.batch)
        return call

    def prepare_write(self, batch: RaggedBatch, fitted: WriteCall) -> None:
        """As `Backend.prepare_write`."""

    def write(
        self,
        pages: KVPages,
        k: Float[Array, "tokens kv_heads head_dim"],
        v: Float[Array, "tokens kv_heads v_head_dim"] | None,
        prepared: PreparedBatch,
    ) -> KVPages:
        """As `Backend.write`."""

        @without_gradient(self.name)
        def write(pages, k, v, batch):
            return write_kv_tpu(pages, k, v, batch, interpret=self.interpret)

        return write(pages, k, v, prepared.batch)


BACKEND = TpuBackend()
