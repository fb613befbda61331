"""EasyDeL's operator on a paged KV cache, as a name and a call around `attend`."""

import dataclasses
import functools

from paged_attn_layer._src.attention.attend import attend
from paged_attn_layer._src.attention.mesh import on_mesh, platform_of, resolve_mesh
from paged_attn_layer._src.easydel.dispatch import StepMetadata, to_ragged, to_rows
from paged_attn_layer._src.easydel.registry import AttentionImpl, AttentionOutput, AttentionRegistry, Forward, Heads
from paged_cache import PagedAttentionCacheView
from paged_kernels import HeadParams

PLAIN = "xla"
"""The kernels' backend that runs on every platform."""


@AttentionRegistry.register
class PagedAttn(AttentionImpl):
    """Attention of a step's tokens over the pages of their sequences: `attend`, in EasyDeL's shapes.

    Writes `k` and `v` into the pages, then attends. The output carries the view that holds them; the caller's view is
    unchanged. With `k` and `v` both `None` it only reads. Latent pages take `k` alone. Queries, keys and values are
    shaped by the step:

        prefill       [1, tokens, heads, head_dim]           one chunk of one prompt
        decode        [seqs, 1, heads, head_dim]             one token of each sequence
        mixed         [tokens + seqs, 1, heads, head_dim]    the chunk's tokens, then one of each sequence
        RaggedBatch   [tokens, heads, head_dim]              any mix; [replicas, tokens, heads, head_dim] on a data axis

    The output has the shape of the queries (and the size of a value), in their dtype or the metadata's `runtime_dtype`.
    Tree masks and parts of a context belong to the batch, sinks and ALiBi slopes to `head_params`.

    On a mesh (`resolve_mesh`) each device attends its own heads, KV heads with their queries. KV heads that the mesh
    axis does not divide are computed whole on every device, with the same result.
    """

    @classmethod
    def get_impl_name(cls) -> str:
        """Always `"paged_attention"`."""
        return "paged_attention"

    @property
    def forward_native(self) -> Forward:
        """The output by plain XLA, which runs everywhere."""
        return functools.partial(self._attend, PLAIN)

    @property
    def forward_cpu(self) -> Forward:
        """The output by the first backend that can, of those for CPUs."""
        return functools.partial(self._attend, self._first_choice("cpu"))

    @property
    def forward_gpu(self) -> Forward:
        """The output by the first backend that can, of those for GPUs."""
        return functools.partial(self._attend, self._first_choice("gpu"))

    @property
    def forward_tpu(self) -> Forward:
        """The output by the Pallas kernels for TPUs."""
        return functools.partial(self._attend, "tpu")

    def _first_choice(self, platform: str) -> str | None:
        """`None`, with which the kernels choose, on the platform itself; elsewhere what runs everywhere."""
        return None if platform_of(resolve_mesh(self.metadata.mesh, None)) == platform else PLAIN

    def _attend(  # noqa: PLR0917 - the backend, then what every `forward_*` takes
        self,
        backend: str | None,
        q: Heads,
        k: Heads | None,
        v: Heads | None,
        cache_view: PagedAttentionCacheView,
        cache_metadata: StepMetadata,
        *,
        head_params: HeadParams | None = None,
        return_lse: bool = False,
    ) -> AttentionOutput:
        metadata = self.metadata
        batch = to_ragged(q, cache_metadata, cache_view)
        attended = attend(
            to_rows(q if metadata.runtime_dtype is None else q.astype(metadata.runtime_dtype), cache_metadata),
            None if k is None else to_rows(k, cache_metadata),
            None if v is None else to_rows(v, cache_metadata),
            on_mesh(cache_view, metadata.mesh, metadata.partition_manager),
            batch,
            metadata.spec(),
            head_params=head_params,
            backend=metadata.backend or backend,
            return_lse=return_lse,
        )
        # The caller's own split, not this call's: a view keeps its tree structure through scans and compiled steps.
        view = dataclasses.replace(cache_view, pages=attended.view.pages)
        lead = q.shape[:-1]  # with EasyDeL's axis of size 1
        lse = None if attended.lse is None else attended.lse.reshape(lead)
        return AttentionOutput(attended.out.reshape(*lead, -1), cache_view=view, lse=lse)
