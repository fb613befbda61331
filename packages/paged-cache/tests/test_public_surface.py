"""What can be imported is a promise: a change of this list is in the changelog, and raises the version.

For each module the names of its `__all__`, with their signatures and the first lines of their docstrings. `None` stands
for what has no signature, or no docstring of its own: types, numbers and texts.
"""

# ruff: noqa: E501 - a name and its meaning are easier to read in one line
import importlib
import inspect

import pytest

import paged_cache

EASYDEL = ("PagedAttentionCache", "PagedAttentionCacheMetaData", "PagedAttentionCacheView", "PagedAttentionMetadata")
SURFACE = {
    "paged_cache": {
        "BatchShapes": (
            "(tokens, max_seqs, pages_per_seq, groups=1, cross_groups=())",
            "The shapes that steps are padded to. A compiled function of a step is compiled once per shape.",
        ),
        "CacheConfig": (
            "(*, views, num_pages, page_size, max_sequence_length, max_seqs, dtype=bfloat16)",
            "Sizes of a paged KV cache: each view has `num_pages` pages of `page_size` tokens. Static and hashable.",
        ),
        "CacheSpec": (
            "(*, groups, shared_layers=(), assumed=())",
            "What cache a model's layers need: what each layer sees (`LayerGroup`), and what it stores (`KVShape`).",
        ),
        "HFConfig": (
            "(values, *, architecture=None, model_type=None, defaults=None)",
            "The keys of a Hugging Face config.json, each read as what it must be.",
        ),
        "KVShape": (
            "(*, num_kv_heads, head_dim, v_head_dim=None, latent=False, dtype=None)",
            "What one layer stores for one token: `num_kv_heads` entries, each a key of `head_dim` numbers and a value.",
        ),
        "LayerGroup": (
            "(*, kind, tokens=0, layers=(), kv=None)",
            "Layers that share one page table per sequence. `kind` decides which keys a query at position `t` sees.",
        ),
        "Media": (
            "(*, start, stop, digest)",
            "A picture or a sound that the tokens `start : stop` stand for. Their token ids alone do not identify it.",
        ),
        "OutOfPages": ("(asked, free, where='')", "Fewer pages are free than were asked for. Nothing was allocated."),
        "PageManager": (
            "(num_pages, page_size, *, max_seqs, max_sequence_length, groups=(LayerGroup(kind='full', tokens=0, layers=(), kv=None),), prefix_reuse=True, scrub=False, num_host_pages=0)",
            "Allocates pages to sequences, shares pages of equal prefixes, and frees pages.",
        ),
        "PageMoves": (
            "(*, copy_from, copy_to, zero, out_from, out_to, in_from, in_to)",
            "The moves of one phase, as int32 page ids. All reads of a phase come before its writes, so order is free.",
        ),
        "PartitionManager": (
            None,
            "What this package needs of a partition manager, such as eformer's: the mesh axes of named array axes.",
        ),
        "Prompt": (
            "(token_ids, *, namespace='', adapter='', media=())",
            "Token ids with a namespace, an adapter and media. Two prompts share pages only if all of these are equal.",
        ),
        "ScheduledSequence": (
            "(page_ids, kv_len, q_len)",
            "One sequence of a step, which computes its newest `q_len` tokens.",
        ),
        "StepBatch": (
            "(buffer, layout)",
            "One step: its sequences, rows and page tables, in one buffer. The sequences are in the order given.",
        ),
        "StepShape": ("(tokens, max_q_len)", "The part of a step's shape that varies. Each shape is compiled once."),
        "__version__": (None, None),
        "apply_moves": (
            "(cache, moves, host=None)",
            "Make these moves, phase by phase, and return the cache. In a phase, all reads come before all writes.",
        ),
        "apply_moves_by_replica": (
            "(cache, moves, host=None)",
            "As `apply_moves`, with one list of moves per replica. All replicas move at the same time.",
        ),
        "kv_head_axis": (
            "(mesh, num_kv_heads, partition_manager=None)",
            "The mesh axis that KV heads are split over; `None` if every device holds all of them.",
        ),
        "stack_batches": (
            "(batches)",
            "Stack the batches of all replicas: every array gets a leading `[replicas]` axis.",
        ),
        "warm_up_moves": (
            "(cache, most, host=None)",
            "Compile copies of up to `most` pages; the cache is donated and returned unchanged.",
        ),
        "PagedAttentionCache": (
            "(views)",
            "The pages of all layers: one view a layer, or views that several layers share (`CacheSpec.places`).",
        ),
        "PagedAttentionCacheMetaData": (
            "(*, views, num_pages, page_size, max_sequence_length, max_seqs, dtype=bfloat16)",
            "Sizes of a paged KV cache: each view has `num_pages` pages of `page_size` tokens. Static and hashable.",
        ),
        "PagedAttentionCacheView": (
            "(pages, mesh=None, head_axis=None, data_axis=None)",
            "The KV pages of one layer, or of layers that share a view. A write returns a new view; the old one is unchanged.",
        ),
        "PagedAttentionMetadata": (
            "(*, prefill_length=None, prefill_position=None, prefill_page_table=None, decodes_position=None, decodes_page_table=None)",
            "One step: a chunk of one prompt, one new token of each decoding sequence, or both (mixed).",
        ),
    },
    "paged_cache.transfer": {
        "HostPages": (
            "(num_pages, shape, replicas, memory_kind)",
            "Host memory for the contents of `num_pages` pages per replica, split into the parts of each device.",
        ),
        "SequencePages": (
            "(token_ids, cross_tokens, places, groups, layout, arrays)",
            "The pages of a sequence, for a cache with the same layout and the same layer groups.",
        ),
        "export_sequence": (
            "(cache, manager, seq, *, replica=0)",
            "Export the pages of a sequence's computed tokens. The sequence does not change.",
        ),
        "import_sequence": (
            "(cache, manager, pages, *, namespace='', adapter='', media=(), host=None, replica=0)",
            "Add a sequence with these pages, fully computed. Returns the cache, which is donated, and the sequence's id.",
        ),
        "load_prefix_cache": (
            "(path, cache, manager, *, model='', replica=0, host=None)",
            "Load pages from a file into empty pages, index them, and return the cache. It is donated.",
        ),
        "save_prefix_cache": (
            "(path, cache, manager, *, model='', replica=0, progress=iter)",
            "Write all indexed pages to a safetensors file with checksums.",
        ),
    },
    "paged_cache.monitoring": {
        "EventKind": (None, None),
        "PageEvent": ("(kind, page, group, hash=b'')", "Something that happened to one page."),
        "PageHistory": ("()", "The state of a manager's pages after each step, and the events of each step."),
        "PageStats": (
            "(*, num_used, num_cached, num_empty, num_seqs, unused_slots, page_size, queried_tokens, cached_tokens, evictions, copies, swapped_out, swapped_in, peak_used)",
            "State and totals of a page manager at one moment.",
        ),
        "Subscriber": (None, None),
    },
    "paged_cache.planning": {
        "Plan": (
            "(*, spec, memory_bytes, page_size, dtype, tensor_parallel, chunk)",
            "What a cache of `memory_bytes` on each device holds. `plan` makes it, and says what the fields are.",
        ),
        "plan": (
            "(spec, memory_bytes, *, page_size=16, dtype='bfloat16', tensor_parallel=1, chunk=512)",
            "What fits into `memory_bytes` of each device. Touches no device.",
        ),
    },
}


def is_protocol(what):
    return getattr(what, "_is_protocol", False)


def plain_signature(what):
    """Names, kinds and defaults of the parameters, without types."""
    if is_protocol(what) or not (inspect.isclass(what) or inspect.isfunction(what)):
        return None
    parameters = inspect.signature(what).parameters.values()
    text = str(inspect.Signature([each.replace(annotation=inspect.Parameter.empty) for each in parameters]))
    return text.replace("<class 'jax.numpy.bfloat16'>", "bfloat16").replace("<built-in function iter>", "iter")


def meaning(what):
    """The first line of the docstring."""
    if plain_signature(what) is None and not is_protocol(what):
        return None
    return inspect.getdoc(what).split("\n")[0]


@pytest.mark.parametrize("name", SURFACE)
def test_names_signatures_and_meanings(name):
    module = importlib.import_module(name)
    listed = {each: getattr(module, each) for each in module.__all__}
    assert {each: (plain_signature(what), meaning(what)) for each, what in listed.items()} == SURFACE[name]


@pytest.mark.parametrize("name", SURFACE)
def test_a_module_says_what_is_in_it(name):
    assert importlib.import_module(name).__doc__


def test_meanings_are_whole_sentences():
    unfinished = [name for names in SURFACE.values() for name, (_, text) in names.items() if text and text[-1] != "."]
    assert unfinished == []


def test_easydels_names_come_last():
    assert tuple(paged_cache.__all__[-len(EASYDEL) :]) == EASYDEL


def test_a_name_is_in_one_module():
    names = [name for module in SURFACE for name in SURFACE[module]]
    assert len(names) == len(set(names))
