"""The reference backend, which defines what is correct: one query row at a time, slow, in float64 if enabled."""

import dataclasses

from jaxtyping import Array, Float

from paged_kernels._src.attention.reference import paged_attention_reference
from paged_kernels._src.backends.base import Backend, PreparedBatch
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.call import AttentionCall
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceBackend(Backend):
    """Takes every call, and has gradients."""

    name: str = "reference"

    def fit_attention(self, call: AttentionCall) -> AttentionCall:
        """Returns the call itself."""
        return call

    def prepare_attention(self, batch: RaggedBatch, fitted: AttentionCall) -> None:
        """Returns None: it reads the batch in every layer."""

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
        call: AttentionCall = prepared.fitted.attention
        out, lse = paged_attention_reference(q, pages, prepared.batch, call.spec, head_params)
        return out, lse if return_lse else None


BACKEND = ReferenceBackend()
