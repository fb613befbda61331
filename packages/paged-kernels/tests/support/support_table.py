"""The README's table of what each backend supports, as the backends answer.

python packages/paged-kernels/tests/support/support_table.py
"""

from kernel_data import FEATURES, HEADS, KV_DTYPES, SPECS, WORKLOADS, make_case

from paged_kernels import explain_backends

BACKENDS = {"reference": "reference", "cpu": "cpu", "xla": "xla", "tpu": "tpu_interpret"}
"""The columns, and the backend that answers. The interpreted kernel refuses what the compiled one refuses."""

SHAPES = WORKLOADS | FEATURES


def sizes(of, *, latent: bool = False) -> dict:
    """Each size of some workload, in order, with the name of the first workload that has it."""
    found = {}
    for name, workload in SHAPES.items():
        if workload.latent == latent:
            found.setdefault(of(workload), name)
    return dict(sorted(found.items()))


def head_size(workload) -> tuple[int, int]:
    return workload.head_dim, workload.value_dim


def name_of(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}/{size[1]}"


def make_rows() -> dict[str, list[dict[str, str]]]:
    """The rows of the table, each with the calls that must work."""
    heads, pages = sizes(head_size), sizes(lambda workload: workload.page_size)
    kinds = {"decode": "decode", "prefill": "prefill", "chunked prefill": "chunked_prefill", "mixed": "mixed"}
    kinds |= {"multi-token decode": "multi_token_decode", "idle sequences": "decode_idle_sequences", "padding": "gaps"}
    ratios = {"MHA": "decode_mha", "GQA": "decode", "MQA": "decode_mqa"}
    rows = {
        ", ".join(kinds): [{"workload": name} for name in kinds.values()],
        ", ".join(ratios): [{"workload": name} for name in ratios.values()],
        "`softmax_scale`, `soft_cap`, `sliding_window`, `causal=False`": [{"spec": spec} for spec in SPECS],
        "sinks, ALiBi, both": [{"heads": heads} for heads in HEADS],
        "tree masks of any width": [{"workload": name} for name in ("tree_verify", "wide_tree")],
        "parts of a context (`q_starts`)": [{"workload": "part_of_context"}],
        f"head sizes {', '.join(map(name_of, heads))} (K/V)": [{"workload": name} for name in heads.values()],
        "latent entries (MLA)": [{"workload": name} for name in sizes(head_size, latent=True).values()],
        f"page sizes {', '.join(map(str, pages))}": [{"workload": name} for name in pages.values()],
    }
    rows |= {f"q in {dtype}": [{"dtype": dtype, "kv_dtype": "float32"}] for dtype in ("float32", "bfloat16", "float16")}
    return rows | {f"pages in {dtype}": [{"kv_dtype": dtype}] for dtype in (*KV_DTYPES, "float16")}


def has(backend: str, asked: dict[str, str]) -> bool:
    """True if the backend takes this call."""
    spec = SPECS[asked.get("spec", "plain")]
    data = {name: asked[name] for name in ("dtype", "kv_dtype", "heads") if name in asked}
    case = make_case(SHAPES[asked.get("workload", "decode")], spec=spec, **data)
    return explain_backends(case.q, case.pages, case.batch, spec, case.heads).why_not[BACKENDS[backend]] is None


def make_table() -> str:
    """The table, as Markdown."""
    lines = [f"| | {' | '.join(f'`{backend}`' for backend in BACKENDS)} |", "|---" * (1 + len(BACKENDS)) + "|"]
    for words, asked in make_rows().items():
        answers = ["yes" if all(has(backend, one) for one in asked) else "no" for backend in BACKENDS]
        lines.append(f"| {words} | {' | '.join(answers)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(make_table())
