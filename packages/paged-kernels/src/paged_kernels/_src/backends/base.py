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

        fit_*      once a compilation   the arguments' shapes -> its static choices, or why it cannot take them
        prepare_*  once a step          the batch             -> what every layer needs of it
        attend, write  in each layer    arrays, and what was prepared

    Each backend is one value, `BACKEND`, in a file of its name; `table` lists the names.
    """

    name: str
    """What `backend=` calls it."""
    platforms: tuple[str, ...] | None = None
    """The platforms that it can run on, by jax's names; `None` means all."""

    @abc.abstractmethod
    def fit_attention(self, call: AttentionCall) -> Hashable:
        """The static choices for this attention.

        Raises:
            NotImplementedError: it cannot take the call; a sentence that says why.
        """

    @abc.abstractmethod
    def prepare_attention(self, batch: RaggedBatch, fitted: Any) -> Any:
        """The arrays that attention needs of the batch in every layer; a pytree."""

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
        """The output in `q.dtype`, and the log-sum-exp of each row, which is `None` where it is not asked for."""

    def fit_write(self, call: WriteCall) -> Hashable:
        """The static choices for this page write; unless a backend has its own, the write is one scatter by XLA.

        Raises:
            NotImplementedError: it cannot take the call; a sentence that says why.
        """
        return call

    def prepare_write(self, batch: RaggedBatch, fitted: Any) -> Any:
        """The arrays that the page write needs of the batch in every layer; a pytree."""
        return row_slots(fitted.pages, batch, fitted.tokens)

    def write(
        self,
        pages: KVPages,
        k: Float[Array, "tokens kv_heads head_dim"],
        v: Float[Array, "tokens kv_heads v_head_dim"] | None,
        prepared: "PreparedBatch",
    ) -> KVPages:
        """The pages with each row in its slot; rows that go nowhere are dropped."""
        return pages.put_entries(*prepared.write, k, v)

    def with_block_sizes(self, *, q_rows: int, kv_pages: int) -> "Backend":
        """The same backend with blocks of so many query rows and pages; itself where it does not cut the work.

        Block sizes never change the result beyond rounding.
        """
        del q_rows, kv_pages
        return self

    def why_not(self, call: Call) -> str | None:
        """Why it cannot take this call, a sentence; `None` if it can."""
        if reason := self._why_not_on(call.platform):
            return reason
        try:
            self.fit(call)
        except NotImplementedError as error:
            return str(error)
        return None

    def fit(self, call: Call) -> "FittedBackend":
        """This backend with its static choices for the call.

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
            f"{', '.join(self.platforms)} only; use backend='xla', or None for the platform's"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedBackend:
    """A backend with its static choices for one call. Hashable: a static argument of `jax.jit`."""

    backend: Backend
    call: Call
    attention: Hashable = None
    """What `Backend.fit_attention` returned."""
    write: Hashable = None
    """What `Backend.fit_write` returned."""

    def prepare(self, batch: RaggedBatch) -> "PreparedBatch":
        """The batch with the arrays that the call's layers need of it."""
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
    """A batch with what a backend derives from it once a step (`prepare_batch`).

    `write_kv` and `paged_attention` take it in place of the batch, in every layer whose shapes and spec are those that
    it was prepared for. A pytree of arrays: it goes through `jax.jit`, `jax.shard_map` and `jax.lax.scan`.
    """

    batch: RaggedBatch
    """The step's sequences."""
    attention: Any
    """What the backend's attention needs of them: its work list, its page table, and so on."""
    write: Any
    """What its page write needs: the slot of each row. `None` for a batch that nothing is written through."""
    fitted: FittedBackend = dataclasses.field(metadata={"static": True})
    """The backend, and the shapes, types and options that it was prepared for."""

    @property
    def backend(self) -> Backend:
        """The backend that prepared it, and that runs."""
        return self.fitted.backend


def without_gradient(backend: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` of positional arguments, except that a gradient is refused by the backend's name, not from inside jax."""
    refusing = jax.custom_jvp(fn)

    @refusing.defjvp
    def refuse(primals, tangents):
        raise NotImplementedError(f"backend={backend!r} has no gradient; use backend='reference'")

    return refusing
