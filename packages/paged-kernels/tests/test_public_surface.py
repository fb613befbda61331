"""What can be imported from `paged_kernels` is a promise: changing this list changes the version and the changelog."""

import inspect

import paged_kernels

SURFACE = {
    "AttentionSpec": "(*, softmax_scale=None, causal=True, sliding_window=None, soft_cap=None)",
    "BACKENDS": None,
    "Backend": None,
    "BlockSizes": "(*, q_rows, kv_pages)",
    "HeadParams": "(*, sinks=None, alibi_slopes=None)",
    "KVPages": "(*, data, scales=None, layout)",
    "RaggedBatch": "(*, page_table, kv_lens, cu_q_lens, num_seqs, max_q_len=None, tree_mask=None, q_starts=None)",
    "KVLayout": "(*, k_dim, v_dim, dtype, latent=False)",
    "TokenRows": "(seq, position, is_token)",
    "__version__": None,
    "check_batch": "(batch, *, num_pages, page_size, tokens)",
    "merge_attention_states": "(outputs, lses)",
    "pack_tree_masks": "(masks, q_lens, *, tokens)",
    "paged_attention": "(q, pages, batch, spec, head_params=None, *, backend=None, block_sizes=None, return_lse=False)",
    "paged_attention_update": "(q, k, v, pages, batch, spec, head_params=None, *, backend=None)",
    "pallas_paged_attention": "(q, k_pages, v_pages, lengths, page_indices, *, sm_scale=None, mask_value=-2.3e+38, "
    "attn_logits_soft_cap=None, pages_per_compute_block=None, backend=None)",
    "pallas_prefill_attention": "(q, k_pages, v_pages, length, page_indices, *, sm_scale=None, backend=None)",
    "resolve_backend": "(backend)",
    "token_rows": "(batch, tokens)",
    "write_kv": "(pages, k, v, batch, *, backend=None)",
}


def plain_signature(what) -> str | None:
    """Names, kinds and defaults of the parameters, without types."""
    if not inspect.isclass(what) and not inspect.isfunction(what):
        return None
    signature = inspect.signature(what)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = str(inspect.Signature(bare))
    return text.replace(str(paged_kernels._src.easydel.DEFAULT_MASK_VALUE), "-2.3e+38")


def test_names_and_signatures():
    assert {name: plain_signature(getattr(paged_kernels, name)) for name in paged_kernels.__all__} == SURFACE


def test_backends():
    assert paged_kernels.BACKENDS == ("reference", "xla", "tpu", "tpu_interpret")


def test_every_public_thing_says_what_it_is():
    undocumented = [name for name in SURFACE if name[0].islower() and not getattr(paged_kernels, name).__doc__]
    assert undocumented == []
