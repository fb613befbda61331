"""The attention operator on a paged KV cache: it writes the new keys and values, and attends."""

import dataclasses

from paged_attn_layer._src.attention.attend import Inputs, place, view_on_mesh, write_and_attend
from paged_attn_layer._src.attention.mesh import resolve_mesh
from paged_attn_layer._src.easydel.dispatch import (
    CacheMetadata,
    check_head_params,
    check_new_tokens,
    check_queries,
    to_ragged,
    to_rows,
)
from paged_attn_layer._src.easydel.registry import AttentionImpl, AttentionOutput, AttentionRegistry, Heads
from paged_cache import PagedAttentionCacheView
from paged_kernels import Backend, HeadParams


@AttentionRegistry.register
class PagedAttn(AttentionImpl):
    """Attention of a step's tokens over the pages of their sequences.

    Writes `k` and `v` into the pages, then attends; the output carries the view that holds them, and the caller's
    view is unchanged. With `k` and `v` both `None` it only reads; latent pages take `k` alone. Queries, keys and values
    are shaped by the step:

        prefill       [1, tokens, heads, head_dim]           one chunk of one prompt
        decode        [seqs, 1, heads, head_dim]             one token of each sequence
        mixed         [tokens + seqs, 1, heads, head_dim]    the chunk's tokens, then one of each sequence
        RaggedBatch   [tokens, heads, head_dim]              any mix; [groups, tokens, heads, head_dim] on a data axis

    The output is shaped as the queries (heads of the values' size), in their dtype or the metadata's `runtime_dtype`.
    Tree masks and parts of a context are the batch's, attention sinks and ALiBi slopes the `head_params` of a call.

    On a mesh (`resolve_mesh`) each device attends its own heads, KV heads with their queries. KV heads that the mesh
    axis does not divide are computed whole on every device, with the same result.
    """

    @classmethod
    def get_impl_name(cls) -> str:
        """Always `"paged_attention"`."""
        return "paged_attention"

    def forward_native(
        self,
        q: Heads,
        k: Heads | None,
        v: Heads | None,
        cache_view: PagedAttentionCacheView,
        cache_metadata: CacheMetadata,
        *,
        head_params: HeadParams | None = None,
    ) -> AttentionOutput:
        """The output by plain XLA, which runs everywhere."""
        return self._forward(q, k, v, cache_view, cache_metadata, head_params=head_params, backend="xla")

    def forward_tpu(
        self,
        q: Heads,
        k: Heads | None,
        v: Heads | None,
        cache_view: PagedAttentionCacheView,
        cache_metadata: CacheMetadata,
        *,
        head_params: HeadParams | None = None,
    ) -> AttentionOutput:
        """The output by the Pallas kernels."""
        return self._forward(q, k, v, cache_view, cache_metadata, head_params=head_params, backend="tpu")

    def _forward(
        self,
        q: Heads,
        k: Heads | None,
        v: Heads | None,
        cache_view: PagedAttentionCacheView,
        cache_metadata: CacheMetadata,
        *,
        head_params: HeadParams | None,
        backend: str | Backend,
    ) -> AttentionOutput:
        metadata = self.metadata
        backend = metadata.backend or backend
        batch = to_ragged(cache_metadata)
        check_queries(q, cache_metadata, cache_view)
        check_new_tokens(k, v, q, cache_view)
        head_params = head_params or HeadParams()
        check_head_params(head_params, q.shape[-2])
        view = view_on_mesh(cache_view, resolve_mesh(metadata.mesh, cache_view.mesh), metadata.partition_manager)
        q_rows = to_rows(q if metadata.runtime_dtype is None else q.astype(metadata.runtime_dtype), cache_metadata)
        k_rows, v_rows = (None if x is None else to_rows(x, cache_metadata) for x in (k, v))
        view.check_batch(batch, q_rows.shape[-3])
        inputs = place(Inputs(q_rows, k_rows, v_rows, view, batch, head_params))
        out, lse, pages = write_and_attend(inputs, spec=metadata.spec(), backend=backend)
        # The caller's own split, not this call's: a view keeps its tree structure through scans and compiled steps.
        new_view = dataclasses.replace(cache_view, pages=pages)
        lead = q.shape[:-1]  # with the seed's axis of size 1
        return AttentionOutput(out.reshape(*lead, -1), cache_view=new_view, lse=lse.reshape(lead))
