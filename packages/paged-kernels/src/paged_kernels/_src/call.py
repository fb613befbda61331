"""A call as a backend sees it before it is chosen: its arguments, with shapes instead of arrays."""

import dataclasses
from typing import TypeVar

import jax
from jaxtyping import Array, Float

from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.device import current_platform
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.spec import AttentionSpec

Tree = TypeVar("Tree")
Queries = Float[Array, "tokens q_heads head_dim"] | jax.ShapeDtypeStruct


def shapes_of(tree: Tree) -> Tree:
    """Returns the pytree with a `jax.ShapeDtypeStruct` for each array. It is hashable if its static fields are."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """The arguments of `paged_attention`, as shapes."""

    q: jax.ShapeDtypeStruct
    """`[tokens, q_heads, head_dim]`."""
    pages: KVPages
    batch: RaggedBatch
    spec: AttentionSpec
    head_params: HeadParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteCall:
    """The arguments of `write_kv`, as shapes."""

    tokens: int
    """The number of rows of k and v."""
    pages: KVPages
    batch: RaggedBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What a backend is asked to do: an attention, a page write, or both for one step. Static and hashable."""

    platform: str
    attention: AttentionCall | None = None
    write: WriteCall | None = None

    @classmethod
    def of_attention(cls, q: Queries, pages: KVPages, batch: RaggedBatch, spec: AttentionSpec, head_params: HeadParams):
        """Returns a call for attention only."""
        shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
        pages, batch, head_params = shapes_of((pages, batch, head_params))
        attention = AttentionCall(q=shape, pages=pages, batch=batch, spec=spec, head_params=head_params)
        return cls(platform=current_platform(), attention=attention)

    @classmethod
    def of_write(cls, tokens: int, pages: KVPages, batch: RaggedBatch):
        """Returns a call for a page write only."""
        pages, batch = shapes_of((pages, batch))
        return cls(platform=current_platform(), write=WriteCall(tokens=tokens, pages=pages, batch=batch))

    @classmethod
    def of_step(cls, q: Queries, pages: KVPages, batch: RaggedBatch, spec: AttentionSpec, head_params: HeadParams):
        """Returns a call for the attention of a step and its page write. With `q_starts` there is no write."""
        attention = cls.of_attention(q, pages, batch, spec, head_params)
        if batch.q_starts is not None:
            return attention
        return dataclasses.replace(attention, write=cls.of_write(q.shape[0], pages, batch).write)
