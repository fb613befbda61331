"""Which backend would run, and why the others cannot."""

import dataclasses

import jax
from jaxtyping import Array, Float

from paged_kernels._src.backends.table import backend_names, get_backend, preferred_names
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.call import Call
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.spec import AttentionSpec
from paged_kernels._src.validation import check_attention_inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackendReport:
    """What each backend says about a call."""

    platform: str
    runs: str | None
    """The backend that `backend=None` takes; `None` if no backend of the platform can take the call."""
    why_not: dict[str, str | None]
    """A sentence for each backend that says why it cannot take the call; `None` if it can."""

    def __str__(self) -> str:
        """One line per backend."""
        lines = [f"on {self.platform}, backend=None runs {self.runs or 'nothing'}"]
        lines += [f"  {name}: {'can' if reason is None else reason}" for name, reason in self.why_not.items()]
        return "\n".join(lines)


def explain_backends(
    q: Float[Array, "tokens q_heads head_dim"] | jax.ShapeDtypeStruct,
    pages: KVPages,
    batch: RaggedBatch,
    spec: AttentionSpec,
    head_params: HeadParams | None = None,
) -> BackendReport:
    """Returns which backend would run these arguments here, and why the others cannot. Print it.

    It covers the attention and the page write of the same step; with `q_starts` only the attention. Only shapes matter.

    Raises:
        ValueError: an argument does not fit the others.
    """
    head_params = head_params or HeadParams()
    check_attention_inputs(q, pages, batch, head_params, spec.sliding_window)
    call = Call.of_step(q, pages, batch, spec, head_params)
    why_not = {name: get_backend(name).why_not(call) for name in backend_names()}
    runs = next((name for name in preferred_names(call.platform) if why_not[name] is None), None)
    return BackendReport(platform=call.platform, runs=runs, why_not=why_not)
