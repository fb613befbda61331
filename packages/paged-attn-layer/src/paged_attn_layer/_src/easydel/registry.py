"""Attention implementations by name: what one is, what it is told, what it returns, and where it is found."""

import abc
import dataclasses
from typing import ClassVar, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from eformer.escale import PartitionManager
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from paged_attn_layer._src.attention.mesh import platform_of, resolve_mesh
from paged_attn_layer._src.easydel.dispatch import StepMetadata
from paged_cache import PagedAttentionCacheView
from paged_kernels import AttentionSpec, Backend, HeadParams, get_backend

PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu")
"""The platforms that an implementation has a `forward_*` for, by jax's names for them."""

Heads = Float[Array, "*rows heads head_dim"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """The options of an attention implementation: everything but the arrays. Hashable; all are optional.

    Raises:
        ValueError: a field has a value that means nothing; names the ones it can have.
        NotImplementedError: `runtime_softmax_dtype` is not float32.
    """

    mesh: Mesh | AbstractMesh | None = None
    """Devices to split the heads over; `None` takes the context's, else the cache view's, else one device."""
    partition_manager: PartitionManager | None = None
    """Names the mesh axis of the heads where the cache view does not; `None` is eformer's default (`"tp"`)."""
    softmax_scale: float | None = None
    """Factor on `q . k`; `None` means `head_dim ** -0.5`."""
    soft_cap: float | None = None
    """Bound on the logits' magnitude; `None` means no bound."""
    sliding_window: int | None = None
    """How many keys a query sees, itself included; `None` means all."""
    causal: bool = True
    """True if a query sees only the keys up to its own position."""
    runtime_dtype: DTypeLike | None = None
    """Type that the queries are cast to, and so the type of the output; `None` keeps theirs."""
    runtime_softmax_dtype: DTypeLike | None = None
    """Type of the softmax and its sums: float32, the only one there is."""
    platform: str | None = None
    """Picks the `forward_*`; `None` takes the mesh's platform, else the default device's."""
    backend: str | Backend | None = None
    """Kernel backend to run in place of the one that the `forward_*` would."""

    def __post_init__(self) -> None:
        self.spec()  # checks scale, cap, window and causal
        _check_one_of("platform", self.platform, PLATFORMS)
        if self.backend is not None:
            get_backend(self.backend)  # refuses an unknown name
        if self.runtime_dtype is not None and not jnp.issubdtype(self.runtime_dtype, np.floating):
            raise ValueError(f"runtime_dtype={self.runtime_dtype} must be a floating type, or None to keep q's")
        if self.runtime_softmax_dtype is not None and jnp.dtype(self.runtime_softmax_dtype) != jnp.float32:
            raise NotImplementedError(
                f"runtime_softmax_dtype={self.runtime_softmax_dtype} is not supported: the softmax and its sums are "
                "float32 always; leave it None"
            )

    def spec(self) -> AttentionSpec:
        """The part of it that a kernel is compiled for."""
        return AttentionSpec(
            softmax_scale=self.softmax_scale,
            soft_cap=self.soft_cap,
            sliding_window=self.sliding_window,
            causal=self.causal,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionOutput:
    """What an attention implementation returns."""

    attention_outputs: Heads
    """The output, shaped as the queries."""
    attention_weights: Array | None = None
    """The softmax weights, of an implementation that gives them."""
    cache_view: PagedAttentionCacheView | None = None
    """The cache view after the call, with the new keys and values in it; the caller's own is unchanged."""
    lse: Float[Array, "*rows heads"] | None = None
    """The log of each row's softmax denominator: outputs over parts of the context merge by it
    (`paged_kernels.merge_attention_states`)."""


class Forward(Protocol):
    """One way to compute attention: the signature of every `forward_*`."""

    def __call__(
        self,
        q: Heads,
        k: Heads | None,
        v: Heads | None,
        cache_view: PagedAttentionCacheView,
        cache_metadata: StepMetadata,
        *,
        head_params: HeadParams | None = None,
        return_lse: bool = False,
    ) -> AttentionOutput:
        """The output, and the view with `k` and `v` in its pages."""
        ...


class AttentionImpl(abc.ABC):
    """One attention implementation; a call runs the `forward_*` of the platform.

        forward_native  <-  forward_cpu, forward_tpu, forward_gpu  <-  forward_cuda, forward_rocm

    Each is the one to its left, until a subclass overrides it, by a method or a property. A subclass gives a name and
    `forward_native`.
    """

    def __init__(self, metadata: AttentionMetadata | None = None) -> None:
        self.metadata = AttentionMetadata() if metadata is None else metadata

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttentionImpl) and type(self) is type(other) and self.metadata == other.metadata

    def __hash__(self) -> int:  # by value, so that it can be a static argument of jax.jit
        return hash((type(self), self.metadata))

    @classmethod
    @abc.abstractmethod
    def get_impl_name(cls) -> str:
        """The name that it is registered and found under."""

    @property
    @abc.abstractmethod
    def forward_native(self) -> Forward:
        """The output where there is nothing better for the platform."""

    @property
    def forward_cpu(self) -> Forward:
        """The output on CPU."""
        return self.forward_native

    @property
    def forward_tpu(self) -> Forward:
        """The output on TPU."""
        return self.forward_native

    @property
    def forward_gpu(self) -> Forward:
        """The output on a GPU of any make."""
        return self.forward_native

    @property
    def forward_cuda(self) -> Forward:
        """The output on an NVIDIA GPU."""
        return self.forward_gpu

    @property
    def forward_rocm(self) -> Forward:
        """The output on an AMD GPU."""
        return self.forward_gpu

    def __call__(
        self,
        q: Heads,
        k: Heads | None,
        v: Heads | None,
        cache_view: PagedAttentionCacheView,
        cache_metadata: StepMetadata,
        *,
        head_params: HeadParams | None = None,
        mesh: Mesh | AbstractMesh | None = None,
        softmax_scale: float | None = None,
        soft_cap: float | None = None,
        sliding_window: int | None = None,
        causal: bool | None = None,
        return_lse: bool = False,
        return_attention_weights: bool = False,
    ) -> AttentionOutput:
        """The output of the platform's `forward_*`. A keyword that is not `None` stands in for the metadata's field.

        `head_params` are the layer's parameters of the query heads: attention sinks, ALiBi slopes.

        Raises:
            NotImplementedError: `return_attention_weights`: the weights of a paged cache are never materialised.
            ValueError: `cache_view` is none, or the platform has no `forward_*`.
        """
        if not isinstance(cache_view, PagedAttentionCacheView):
            raise ValueError(
                f"cache_view is a {type(cache_view).__name__}; it must be one layer's PagedAttentionCacheView, such as "
                "cache.views[0]"
            )
        if return_attention_weights:
            raise NotImplementedError(
                "return_attention_weights=True is not supported: the weights over a paged cache are never materialised"
            )
        given = {
            "mesh": mesh,
            "softmax_scale": softmax_scale,
            "soft_cap": soft_cap,
            "sliding_window": sliding_window,
            "causal": causal,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        impl = type(self)(dataclasses.replace(self.metadata, **changes)) if changes else self
        forward = impl._forward(cache_view)
        return forward(q, k, v, cache_view, cache_metadata, head_params=head_params, return_lse=return_lse)

    def _forward(self, cache_view: PagedAttentionCacheView) -> Forward:
        """The `forward_*` of the platform that the metadata names, or that the arrays lie on."""
        platform = self.metadata.platform or platform_of(resolve_mesh(self.metadata.mesh, cache_view.mesh))
        _check_one_of("platform", platform, PLATFORMS)
        match platform:
            case "cpu":
                return self.forward_cpu
            case "tpu":
                return self.forward_tpu
            case "cuda":
                return self.forward_cuda
            case "rocm":
                return self.forward_rocm
            case _:
                return self.forward_gpu


ImplClass = TypeVar("ImplClass", bound=type[AttentionImpl])


class AttentionRegistry:
    """The registered attention implementations, by name."""

    _implementations: ClassVar[dict[str, type[AttentionImpl]]] = {}

    @classmethod
    def register(cls, impl: ImplClass) -> ImplClass:
        """Class decorator: makes an implementation known under its `get_impl_name()`.

        Raises:
            ValueError: another implementation has that name, or it is no `AttentionImpl`.
        """
        if not (isinstance(impl, type) and issubclass(impl, AttentionImpl)):
            raise ValueError(f"{impl!r} must be a subclass of AttentionImpl")
        name = impl.get_impl_name()
        if name in cls._implementations:
            raise ValueError(f"{name!r} is registered already; choose a name other than {cls._known()}")
        cls._implementations[name] = impl
        return impl

    @classmethod
    def get(cls, name: str) -> type[AttentionImpl]:
        """The implementation registered under a name.

        Raises:
            ValueError: there is none; lists those there are.
        """
        if name not in cls._implementations:
            raise ValueError(f"attention implementation {name!r} is not registered; there is {cls._known()}")
        return cls._implementations[name]

    @classmethod
    def create(cls, name: str, metadata: AttentionMetadata | None = None) -> AttentionImpl:
        """An instance of the implementation registered under a name.

        Raises:
            ValueError: there is none; lists those there are.
        """
        return cls.get(name)(metadata)

    @classmethod
    def list_implementations(cls) -> list[str]:
        """The registered names, sorted.

        >>> "paged_attention" in AttentionRegistry.list_implementations()
        True
        """
        return sorted(cls._implementations)

    @classmethod
    def _known(cls) -> str:
        return ", ".join(map(repr, cls.list_implementations()))


def _check_one_of(name: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}, or None to let the devices decide")
