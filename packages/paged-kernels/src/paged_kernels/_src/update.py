"""The one call of a decoding step: new keys and values into the pages, then attention over them."""

from jaxtyping import Array, Float

from paged_kernels._src.attention.api import paged_attention
from paged_kernels._src.backends import Backend
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.page_write.api import write_kv
from paged_kernels._src.spec import AttentionSpec


def paged_attention_update(  # noqa: PLR0917 -- the three rows, then what `paged_attention` takes
    q: Float[Array, "tokens q_heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads v_head_dim"] | None,
    pages: KVPages,
    batch: RaggedBatch,
    spec: AttentionSpec,
    head_params: HeadParams | None = None,
    *,
    backend: Backend | None = None,
) -> tuple[Float[Array, "tokens q_heads v_head_dim"], KVPages]:
    """The attention output over pages that hold the batch's new keys and values, and those pages.

    Equal to `write_kv`, then `paged_attention`; donate `pages` to `jax.jit` and nothing is copied. Layers that share
    the keys and values of another call `paged_attention` alone.

    Raises:
        ValueError: as `write_kv` and `paged_attention`; nothing is written then.
        NotImplementedError: likewise.
    """
    pages = write_kv(pages, k, v, batch, backend=backend)
    return paged_attention(q, pages, batch, spec, head_params, backend=backend), pages
