"""Plain XLA, on every platform (docs/kernels/xla.md)."""

import dataclasses

from jaxtyping import Array, Float

from paged_kernels._src.attention.block_sizes import BlockSizes
from paged_kernels._src.attention.xla.walk import check_supported, paged_attention_xla
from paged_kernels._src.backends.base import Backend, PreparedBatch, without_gradient
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.call import AttentionCall
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaBackend(Backend):
    """Takes every call but those in float64; its page write has gradients."""

    name: str = "xla"
    block_sizes: BlockSizes | None = None
    """How the work is cut; `None` picks by the pages."""

    def with_block_sizes(self, *, q_rows: int, kv_pages: int) -> "XlaBackend":
        """As `Backend.with_block_sizes`."""
        return dataclasses.replace(self, block_sizes=BlockSizes(q_rows=q_rows, kv_pages=kv_pages))

    def fit_attention(self, call: AttentionCall) -> AttentionCall:
        """As `Backend.fit_attention`."""
        check_supported(call.q, call.pages)
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
        call: AttentionCall = prepared.fitted.attention

        @without_gradient(self.name)
        def attend(q, pages, batch, head_params):
            return paged_attention_xla(q, pages, batch, call.spec, head_params, block_sizes=self.block_sizes)

        out, lse = attend(q, pages, prepared.batch, head_params)
        return out, lse if return_lse else None


BACKEND = XlaBackend()
