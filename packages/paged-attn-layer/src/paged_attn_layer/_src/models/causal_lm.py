"""What the engine asks of a model."""

from typing import Protocol, runtime_checkable

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from paged_cache import CacheSpec, PagedAttentionCache
from paged_kernels import RaggedBatch


@runtime_checkable
class CausalLM(Protocol):
    """What the engine asks of a model: which cache its layers need, and one call that computes a step.

    The engine, its compiled step and the loaders know nothing else. A model is an `nnx.Module` that has these:

        spec = model.cache_spec                        # which layers see which keys, and what each stores
        cache = a view for each of spec.views()        # layers with pages of one shape share views
        batches = a batch for each of spec.pool_groups()

    A layer `l` finds its batch and its pages by `spec.places()[l]`: `batches[place.group]`, `cache.views[place.view]`.
    """

    @property
    def cache_spec(self) -> CacheSpec:
        """What cache the layers need."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of token ids; ids are `0 .. vocab_size - 1`."""
        ...

    @property
    def max_positions(self) -> int:
        """Tokens of the longest sequence that the model is made for."""
        ...

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer, as the checkpoint says; none if it does not."""
        ...

    @property
    def dtype(self) -> DTypeLike:
        """The type that the model computes keys and values in, and so the cache's unless it is given another."""
        ...

    def __call__(
        self,
        token_ids: Int32[Array, "*replicas tokens"],
        positions: Int32[Array, "*replicas tokens"],
        cache: PagedAttentionCache,
        batches: tuple[RaggedBatch, ...],
        rows: Int32[Array, "*replicas n"],
    ) -> tuple[Float[Array, "*replicas n vocab"], PagedAttentionCache]:
        """Logits (float32) of the token after each of `rows`, and the cache that holds this step's keys and values.

        Args:
            token_ids: this step's tokens, those of each sequence together; padding may hold any.
            positions: of each token in its sequence.
            cache: the pages of all layers, a view for each of `cache_spec.views()`.
            batches: which tokens belong to which sequence, and its pages: one for each of `cache_spec.pool_groups()`.
            rows: the rows whose logits are computed.
        """
        ...
