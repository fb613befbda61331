"""Named workloads, specs, head parameters and types, and the combinations of them that are tested."""

import collections
import dataclasses
import itertools

from pairwise import pairwise

from paged_kernels import AttentionSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """The sequences of one step, by their lengths. They are padded to common shapes, which share compilations."""

    kv_lens: tuple[int, ...]
    """The tokens of each sequence, new ones included; 0 is a gap."""
    q_lens: tuple[int, ...]
    """The rows of each sequence."""
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    v_head_dim: int | None = None
    """`None` means `head_dim`."""
    latent: bool = False
    """True if values are the first `v_head_dim` lanes of keys."""
    page_size: int = 16
    tokens: int = 40
    """The rows of q, padding included."""
    seqs: int = 6
    """The most sequences; entries past the last sequence are nonsense."""
    pages_per_seq: int = 5
    num_pages: int = 32
    max_q_len: int | None = None
    tree: bool = False
    """True if a mask of random bits replaces causality; `max_q_len` then gives its number of words."""
    q_starts: tuple[int, ...] | None = None
    """The position of each sequence's first row, if the pages are only a part of the context."""

    @property
    def value_dim(self) -> int:
        """The size of a value."""
        return self.v_head_dim or self.head_dim

    def first_position(self, seq: int) -> int:
        """The position of the sequence's first row."""
        return self.kv_lens[seq] - self.q_lens[seq] if self.q_starts is None else self.q_starts[seq]


def decode(*kv_lens: int, **shape: int) -> Workload:
    """Returns a workload in which every sequence has one row."""
    return Workload(kv_lens=kv_lens, q_lens=(1,) * len(kv_lens), max_q_len=1, **{"tokens": 6, **shape})


WORKLOADS = {
    "decode": decode(37, 1, 16, 48, 17, 70),
    "decode_idle_sequences": decode(23, 0, 5, 0, 41),
    "decode_mqa": decode(33, 64, 7, q_heads=4, kv_heads=1),
    "decode_mha": decode(19, 35, 50, q_heads=2, kv_heads=2),
    "prefill": Workload(kv_lens=(35,), q_lens=(35,)),
    "prefill_many": Workload(kv_lens=(16, 1, 17, 5), q_lens=(16, 1, 17, 5)),
    "prefill_mqa": Workload(kv_lens=(18, 20), q_lens=(18, 20), q_heads=4, kv_heads=1),
    "prefill_mha": Workload(kv_lens=(21, 15), q_lens=(21, 15), q_heads=2, kv_heads=2),
    "chunked_prefill": Workload(kv_lens=(72, 40), q_lens=(19, 17)),
    "mixed": Workload(kv_lens=(53, 12, 30, 1, 66), q_lens=(18, 12, 1, 1, 1)),
    "multi_token_decode": Workload(kv_lens=(45, 9, 32, 17), q_lens=(4, 3, 4, 1)),
    "gaps": Workload(kv_lens=(20, 0, 31, 0, 8), q_lens=(7, 5, 9, 3, 1)),
    "no_rows": Workload(kv_lens=(20, 24, 11), q_lens=(4, 0, 5)),
    "all_idle": Workload(kv_lens=(0, 0), q_lens=(3, 0)),
    "empty": Workload(kv_lens=(), q_lens=()),
    "full_table": Workload(kv_lens=(80, 80), q_lens=(16, 24)),
    "head_128": Workload(kv_lens=(29, 34), q_lens=(11, 1), head_dim=128),
    "small_pages": Workload(kv_lens=(29, 34, 8), q_lens=(11, 1, 8), page_size=8),
    "large_pages": Workload(kv_lens=(29, 70), q_lens=(11, 1), page_size=64, pages_per_seq=2, num_pages=8),
    "wide_group": Workload(kv_lens=(44, 25), q_lens=(9, 1), q_heads=40, kv_heads=2),
}

RAGGED = {"kv_lens": (29, 34, 8), "q_lens": (11, 1, 8), "tokens": 24, "seqs": 4, "num_pages": 16}

FEATURES = {
    "head_80": Workload(**RAGGED, head_dim=80),
    "head_96": Workload(**RAGGED, head_dim=96),
    "head_192": Workload(**RAGGED, head_dim=192),
    "head_256": Workload(**RAGGED, head_dim=256),
    "head_192_128": Workload(**RAGGED, head_dim=192, v_head_dim=128),
    "head_24_40": Workload(**RAGGED, head_dim=24, v_head_dim=40),
    "latent": Workload(**RAGGED, head_dim=160, v_head_dim=96, latent=True, kv_heads=1),
    "latent_decode": decode(29, 34, 8, head_dim=160, v_head_dim=96, latent=True, kv_heads=1),
    "page_1": Workload(**{**RAGGED, "num_pages": 80}, page_size=1, pages_per_seq=40),
    "page_2": Workload(**{**RAGGED, "num_pages": 48}, page_size=2, pages_per_seq=20),
    "page_4": Workload(**{**RAGGED, "num_pages": 32}, page_size=4, pages_per_seq=10),
    "tree_verify": Workload(kv_lens=(45, 50, 3, 0, 1), q_lens=(4, 30, 3, 2, 1), tree=True, max_q_len=30),
    "wide_tree": Workload(kv_lens=(70, 19), q_lens=(35, 3), tree=True, max_q_len=40),
    "part_of_context": Workload(kv_lens=(48, 32, 0, 29), q_lens=(5, 1, 3, 9), q_starts=(60, 31, 40, 12)),
}
"""Workloads with other kinds of rows, pages, masks or positions, each with its own shape."""

LONG = Workload(
    kv_lens=(33_000,),
    q_lens=(3,),
    q_heads=1,
    kv_heads=1,
    tokens=4,
    seqs=1,
    page_size=256,
    pages_per_seq=130,
    num_pages=132,
)
"""A context of more than 32K tokens."""

EVERY_WORKLOAD = WORKLOADS | FEATURES | {"long": LONG}

SPECS = {
    "plain": AttentionSpec(),
    "scale": AttentionSpec(softmax_scale=0.15),
    "cap": AttentionSpec(soft_cap=1.0),
    "window": AttentionSpec(sliding_window=21),
    "window_of_one": AttentionSpec(sliding_window=1),
    "window_of_a_page": AttentionSpec(sliding_window=16),
    "bidirectional": AttentionSpec(causal=False),
    "bidirectional_window": AttentionSpec(causal=False, sliding_window=9),
    "everything": AttentionSpec(softmax_scale=0.18, soft_cap=1.5, sliding_window=30),
}

HEADS = {"plain": (), "sinks": ("sinks",), "alibi": ("alibi_slopes",), "both": ("sinks", "alibi_slopes")}
"""Which fields of `HeadParams` are given."""

KV_DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2", "int4")


def has_common_shape(workload: Workload) -> bool:
    """True if its arrays have the shapes that most workloads share."""
    return (workload.page_size, workload.q_heads, workload.kv_heads, workload.head_dim) == (16, 4, 2, 64)


CASES = [
    (name, spec)
    for name, workload in WORKLOADS.items()
    for spec in SPECS
    if spec == "everything" or has_common_shape(workload)
]
"""`(workload, spec)` by name: every spec with the common shapes, one with the others, to keep compilations few."""

FEATURE_CASES = [
    tuple(row.values())
    for row in pairwise(
        {
            "workload": ["mixed", "decode", *FEATURES],
            "kv_dtype": KV_DTYPES,
            "spec": ["plain", "window", "bidirectional", "everything"],
            "heads": list(HEADS),
        }
    )
]
"""`(workload, kv_dtype, spec, heads)` by name: every two features meet."""


def few_of_each_workload(cases: list[tuple[str, ...]], count: int) -> list[tuple[str, ...]]:
    """Returns `count` cases of each workload: those whose other values have met the least."""
    taken, met = [], collections.Counter()
    for workload in count * list(dict.fromkeys(case[0] for case in cases)):
        left = [case for case in cases if case[0] == workload and case not in taken]
        values = {case: [*case[1:], *itertools.combinations(case[1:], 2)] for case in left}
        taken.append(min(values, key=lambda case: sum(met[value] for value in values[case])))
        met.update(values[taken[-1]])
    return taken


ONE_FEATURE_CASE = few_of_each_workload(FEATURE_CASES, 1)
"""One case of each workload."""
TWO_FEATURE_CASES = few_of_each_workload(FEATURE_CASES, 2)
"""Two cases of each workload."""

ALL_CASES = [
    ("long", "float32", "window", "plain"),
    *FEATURE_CASES,
    *((workload, "float32", spec, "plain") for workload, spec in CASES),
]
