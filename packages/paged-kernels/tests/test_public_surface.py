"""What can be imported from `paged_kernels` is a promise: changing this list changes the version and the changelog."""

import inspect

import paged_kernels

SURFACE = {
    "AttentionSpec": "(*, softmax_scale=None, causal=True, sliding_window=None, soft_cap=None)",
    "Backend": "(*, name, platforms=None)",
    "HeadParams": "(*, sinks=None, alibi_slopes=None)",
    "KVLayout": "(*, k_dim, v_dim, dtype, latent=False)",
    "KVPages": "(*, data, scales=None, layout)",
    "PreparedBatch": "(*, batch, attention, write, fitted)",
    "RaggedBatch": "(*, page_table, kv_lens, cu_q_lens, num_seqs, max_q_len=None, tree_mask=None, q_starts=None)",
    "__version__": None,
    "check_batch": "(batch, *, num_pages, page_size, tokens, sliding_window=None, writes=True)",
    "explain_backends": "(q, pages, batch, spec, head_params=None)",
    "get_backend": "(backend)",
    "merge_attention_states": "(outputs, lses)",
    "pack_tree_masks": "(masks, q_lens, *, tokens)",
    "paged_attention": "(q, pages, batch, spec, head_params=None, *, backend=None, return_lse=False)",
    "paged_attention_update": "(q, k, v, pages, batch, spec, head_params=None, *, backend=None)",
    "prepare_batch": "(batch, pages, spec, *, tokens, q_heads, q_dtype, head_params=None, backend=None)",
    "write_kv": "(pages, k, v, batch, *, backend=None)",
}
EASYDEL = {
    "pallas_paged_attention": "(q, k_pages, v_pages, lengths, page_indices, *, sm_scale=None, mask_value=-2.3e+38, "
    "attn_logits_soft_cap=None, pages_per_compute_block=None, backend=None)",
    "pallas_prefill_attention": "(q, k_pages, v_pages, length, page_indices, *, sm_scale=None, backend=None)",
}
"""The names for code that is written against EasyDeL's kernels."""

MEANINGS = {
    "AttentionSpec": "The attention to compute. It is hashable, so it can be a static argument of `jax.jit`.",
    "Backend": "One implementation of attention and of the page write. Hashable: a static argument of `jax.jit`.",
    "HeadParams": "A layer's parameters of its query heads, `[q_heads]` each. `None` has no effect and no cost.",
    "KVLayout": "The layout of an entry: what one token and one KV head store in a page.",
    "KVPages": "One layer's pages of keys and values.",
    "PreparedBatch": "A batch, with what a backend computes from it once per step (`prepare_batch`).",
    "RaggedBatch": "The sequences of one step: their rows, their lengths and their pages.",
    "check_batch": "Check that a batch reads and writes only pages that it may. For the host, with concrete arrays.",
    "explain_backends": "Returns which backend would run these arguments here, and why the others cannot. Print it.",
    "get_backend": "Returns the backend of this name, and imports it now. A `Backend` is returned as it is.",
    "merge_attention_states": "Returns the attention over all keys, from the attention over disjoint parts of them.",
    "pack_tree_masks": "Returns the `RaggedBatch.tree_mask` of sequences with these masks, int32 `[tokens, words]`.",
    "paged_attention": "Returns the attention of each query row over the pages of its sequence, in `q.dtype`.",
    "paged_attention_update": "Returns the attention output, and pages that hold the batch's new keys and values.",
    "prepare_batch": "Returns the batch with what all layers of a step share, computed once.",
    "write_kv": "Returns pages with the batch's new keys and values, each at its token's position.",
    "pallas_paged_attention": "EasyDeL's name for decode: each of `seqs` queries attends to its first `lengths` keys.",
    "pallas_prefill_attention": "EasyDeL's name for one prefill chunk of one prompt, causal.",
}
"""The first line of each docstring."""


def plain_signature(what) -> str | None:
    """Names, kinds and defaults of the parameters, without types."""
    if not inspect.isclass(what) and not inspect.isfunction(what):
        return None
    signature = inspect.signature(what)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = str(inspect.Signature(bare))
    return text.replace(str(paged_kernels._src.easydel.DEFAULT_MASK_VALUE), "-2.3e+38")


def test_names_and_signatures():
    names = list(SURFACE | EASYDEL)
    assert paged_kernels.__all__ == names
    assert {name: plain_signature(getattr(paged_kernels, name)) for name in names} == SURFACE | EASYDEL


def test_each_name_says_in_one_line_what_it_is():
    documented = [name for name in paged_kernels.__all__ if name != "__version__"]
    assert {name: getattr(paged_kernels, name).__doc__.splitlines()[0] for name in documented} == MEANINGS


def test_every_name_is_at_home_in_this_package():
    private = {name: getattr(paged_kernels, name).__module__ for name in MEANINGS}
    assert all(module.startswith("paged_kernels._src.") for module in private.values())
