"""What a backend is, and the batch that it prepares."""

import abc
import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jaxtyping import Array, Float

from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.call import AttentionCall, Call, WriteCall
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.page_write.slots import row_slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend(abc.ABC):
    """One implementation of attention and of the page write. Hashable: a static argument of `jax.jit`.

        fit_*          once per compilation   takes the arguments' shapes; returns static choices, or says why it cannot
        prepare_*      once per step          takes the batch; returns what every layer needs from it
        attend, write  in each layer          take arrays, and what was prepared

    Each backend is one value, `BACKEND`, in a file with its name. `table` lists the names.
    """

    name: str
    """The name for `backend=`."""
    platforms: tuple[str, ...] | None = None
    """The platforms on which it can run, by jax's names; `None` means all."""

    @abc.abstractmethod
    def fit_attention(self, call: AttentionCall) -> Hashable:
        """Returns the static choices for this attention.

        Raises:
            NotImplementedError: it cannot take the call. The message says why.
        """

    @abc.abstractmethod
    def prepare_attention(self, batch: RaggedBatch, fitted: Any) -> Any:
        """Returns the arrays that attention needs from the batch in every layer, as a pytree."""

    @abc.abstractmethod
    def attend(
        self,
        q: Float[Array, "tokens q_heads head_dim"],
        pages: KVPages,
        prepared: "PreparedBatch",
        head_params: HeadParams,
        *,
        return_lse: bool,
    ) -> tuple[Float[Array, "tokens q_heads v_head_dim"], Float[Array, "tokens q_heads"] | None]:
        """Returns the output in `q.dtype`, and the log-sum-exp of each row, or `None` if it is not asked for."""

    def fit_write(self, call: WriteCall) -> Hashable:
        """Returns the static choices for this page write. By default the write is one scatter by XLA.

        Raises:
            NotImplementedError: it cannot take the call. The message says why.
        """
        return call

    def prepare_write(self, batch: RaggedBatch, fitted: Any) -> Any:
        """Returns the arrays that the page write needs from the batch in every layer, as a pytree."""
        return row_slots(fitted.pages, batch, fitted.tokens)

    def write(
        self,
        pages: KVPages,
        k: Float[Array, "tokens kv_heads head_dim"],
        v: Float[Array, "tokens kv_heads v_head_dim"] | None,
        prepared: "PreparedBatch",
    ) -> KVPages:
        """Returns pages with each row in its slot. Rows without a slot are dropped."""
        page_ids, slots = prepared.write
        return pages.put_entries(page_ids, slots, k, v)

    def with_block_sizes(self, *, q_rows: int, kv_pages: int) -> "Backend":
        """Returns the same backend with these block sizes, or itself if it has none.

        Block sizes change the result by no more than rounding.
        """
        del q_rows, kv_pages
        return self

    def why_not(self, call: Call) -> str | None:
        """Returns a sentence that says why it cannot take this call; `None` if it can."""
        if reason := self._why_not_on(call.platform):
            return reason
        try:
            self.fit(call)
        except NotImplementedError as error:
            return str(error)
        return None

    def fit(self, call: Call) -> "FittedBackend":
        """Returns this backend with its static choices for the call.

        Raises:
            ValueError: it cannot run on the platform.
            NotImplementedError: it does not have what the call asks for.
        """
        if reason := self._why_not_on(call.platform):
            raise ValueError(reason)
        return FittedBackend(
            backend=self,
            call=call,
            attention=None if call.attention is None else self.fit_attention(call.attention),
            write=None if call.write is None else self.fit_write(call.write),
        )

    def _why_not_on(self, platform: str) -> str | None:
        if self.platforms is None or platform in self.platforms:
            return None
        return (
            f"backend={self.name!r} cannot run here: the platform is {platform!r}, and it runs on "
            f"{', '.join(self.platforms)} only; use backend='xla', or None for the platform's default"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedBackend:
    """A backend with its static choices for one call. Hashable: a static argument of `jax.jit`."""

    backend: Backend
    call: Call
    attention: Any = None
    """The result of `Backend.fit_attention`."""
    write: Any = None
    """The result of `Backend.fit_write`."""

    def prepare(self, batch: RaggedBatch) -> "PreparedBatch":
        """Returns the batch with the arrays that the layers need from it."""
        backend, call = self.backend, self.call
        return PreparedBatch(
            batch=batch,
            attention=None if call.attention is None else backend.prepare_attention(batch, self.attention),
            write=None if call.write is None else backend.prepare_write(batch, self.write),
            fitted=self,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedBatch:
    """A batch, with what a backend computes from it once per step (`prepare_batch`).

    `write_kv` and `paged_attention` take it instead of the batch, in every layer with the shapes and the spec for which
    it was prepared. It is a pytree of arrays and passes through `jax.jit`, `jax.shard_map` and `jax.lax.scan`.
    """

    batch: RaggedBatch
    """The step's sequences."""
    attention: Any
    """What the backend's attention needs from them, such as a work list or a page table."""
    write: Any
    """What the backend's page write needs, such as the slot of each row; `None` with `q_starts`."""
    fitted: FittedBackend = dataclasses.field(metadata={"static": True})
    """The backend, and the shapes, types and options for which the batch was prepared."""

    @property
    def backend(self) -> Backend:
        """The backend that prepared the batch, and that runs."""
        return self.fitted.backend


def without_gradient(backend: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `fn`, but a gradient raises an error that names the backend. `fn` takes positional arguments."""
    refusing = jax.custom_jvp(fn)

    @refusing.defjvp
    def refuse(primals, tangents):
        raise NotImplementedError(f"backend={backend!r} has no gradient; use backend='reference'")

    return refusing
