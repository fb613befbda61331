"""Plain XLA, on every platform (docs/kernels/xla.md)."""

import dataclasses
import functools

from jaxtyping import Array, Float

from paged_kernels._src.attention.block_sizes import BlockSizes
from paged_kernels._src.attention.xla.prepare import WalkConfig, WalkWork, fit, prepare
from paged_kernels._src.attention.xla.walk import attend
from paged_kernels._src.backends.base import Backend, PreparedBatch, without_gradient
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.call import AttentionCall
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaBackend(Backend):
    """Takes every call except float64. Its page write has gradients."""

    name: str = "xla"
    block_sizes: BlockSizes | None = None
    """The block sizes of attention; `None` uses the default for the pages."""

    def with_block_sizes(self, *, q_rows: int, kv_pages: int) -> "XlaBackend":
        """See `Backend.with_block_sizes`."""
        return dataclasses.replace(self, block_sizes=BlockSizes(q_rows=q_rows, kv_pages=kv_pages))

    def fit_attention(self, call: AttentionCall) -> WalkConfig:
        """See `Backend.fit_attention`."""
        return fit(call, self.block_sizes)

    def prepare_attention(self, batch: RaggedBatch, fitted: WalkConfig) -> WalkWork:
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
        walk = functools.partial(attend, config=prepared.fitted.attention, return_lse=return_lse)
        return without_gradient(self.name, walk)(q, pages, prepared.batch, prepared.attention, head_params)


BACKEND = XlaBackend()
