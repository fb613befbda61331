"""`python -m paged_cache plan`: a table of how many pages, tokens and sequences of a model fit into memory."""

import argparse
import dataclasses
import itertools
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

from paged_cache._src.cache.config import MAX_SIZE
from paged_cache._src.manager.groups import KVShape
from paged_cache._src.planning.plan import Plan, plan
from paged_cache._src.spec.cache_spec import CacheSpec

DESCRIPTION = """\
How many pages, tokens and sequences of a model fit into a budget of bytes, by type and page size.
Reads a Hugging Face config.json; needs no weights and no accelerator."""

EPILOG = """\
the table's columns:
  bytes a token     on each device, in all layers, with scales and padding
  padding           the share of these that holds neither numbers nor their scales
  pages             that fit, page 0 (never handed out) included: num_pages of CacheConfig and PageManager
  tokens            whose keys and values fit in all layers
  seqs of N         sequences that fit, all of them N tokens long, with no prefix in common
  longest sequence  tokens of a sequence that has the cache to itself

examples:
  python -m paged_cache plan --model-config config.json --memory 16GiB
  python -m paged_cache plan --model-config config.json --memory 60GB --tensor-parallel 4 \\
      --dtype bfloat16 int8 --page-size 16 32 64 --context 2048 32768
  python -m paged_cache plan --model-config config.json --memory 16GiB --set sliding_window=null --json
"""

DTYPES = ("float32", "float16", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2", "int4")
UNITS = {"": 1, "B": 1, **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}}
UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the options, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code: 0, or 2 after a line that says what is wrong, or 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        print(run(args), flush=True)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"{args.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = _Parser(prog="python -m paged_cache", description="Tools of the paged KV cache.")
    commands = parser.add_subparsers(required=True, metavar="plan")
    command = commands.add_parser(
        "plan",
        help="what fits into memory",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(prog=command.prog)
    add = command.add_argument
    add("--model-config", required=True, type=Path, metavar="PATH", help="the model's config.json")
    add("--memory", required=True, type=size, metavar="SIZE", help="for pages, on each device, as 16GiB or 500MB")
    add("--page-size", nargs="+", type=int, default=[16, 32, 64], metavar="N", help="tokens a page (default: 16 32 64)")
    add(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        default=["bfloat16"],
        metavar="TYPE",
        help=f"of the pages, of {', '.join(DTYPES)} (default: bfloat16)",
    )
    lengths = [2048, 8192, 32768]
    add("--context", nargs="+", type=int, default=lengths, metavar="N", help="of a sequence (default: 2048 8192 32768)")
    add("--tensor-parallel", type=int, default=1, metavar="N", help="devices that KV heads are split over (default: 1)")
    add("--chunk", type=int, default=512, metavar="N", help="most tokens of a prompt in a step (default: %(default)s)")
    add(
        "--set",
        nargs="+",
        action="extend",
        type=setting,
        default=[],
        metavar="KEY=VALUE",
        help="say what the config.json does not, or otherwise than it; null removes a key",
    )
    add("--json", action="store_true", help="print JSON in place of the table")
    return parser


def size(text: str) -> int:
    """Bytes of a size such as 16GiB, 1.5GB or 4096.

    >>> size("16GiB"), size("500MB"), size("4096")
    (17179869184, 500000000, 4096)

    Raises:
        ArgumentTypeError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)?", text)
    if not match or (match[2] or "") not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of bytes, or with a unit as in 16GiB, 16GB, 500MB")
    return int(Decimal(match[1]) * UNITS[match[2] or ""])


def setting(text: str) -> tuple[str, Any]:
    """A key and its value: JSON, or plain text if it is not JSON.

    >>> setting("head_dim=128"), setting("model_type=llama")
    (('head_dim', 128), ('model_type', 'llama'))

    Raises:
        ArgumentTypeError: there is no key.
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} must be KEY=VALUE, as in head_dim=128")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def run(args: argparse.Namespace) -> str:
    """Return what the command prints.

    Raises:
        ValueError: the file or an option cannot be used.
        NotImplementedError: the model keeps something else than keys and values.
        OSError: the file cannot be read.
    """
    spec = read_spec(args.model_config, dict(args.set))
    plans = [
        plan(
            spec,
            args.memory,
            page_size=page_size,
            dtype=dtype,
            tensor_parallel=args.tensor_parallel,
            chunk=args.chunk,
        )
        for dtype, page_size in itertools.product(args.dtype, args.page_size)
    ]
    if args.json:
        return json.dumps([record(each, args.context) for each in plans], indent=1)
    blocks = [heading(args.model_config, plans[0]), table(plans, args.context), notes(plans, max(args.context))]
    return "\n\n".join("\n".join(block) for block in blocks)


def read_spec(path: Path, changes: Mapping[str, Any]) -> CacheSpec:
    """What cache the model of a config.json needs, with `changes` to its keys.

    Raises:
        ValueError: it is not a JSON object, or a key is missing or makes no sense.
        NotImplementedError: the model keeps something else than keys and values.
        OSError: it cannot be read.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); give a model's config.json") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not an object; give a model's config.json")
    if isinstance(text := config.get("text_config"), dict):
        changed = {**config, "text_config": {**text, **changes}}
    else:
        changed = {**config, **changes}
    try:
        return CacheSpec.from_hf_config(changed)
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"{error} (--set KEY=VALUE sets a key of {path.name})") from None


def heading(path: Path, of: Plan) -> list[str]:
    """Return what was read, and the memory that is planned."""
    spec = of.spec
    lines = [f"{path.name}: {_layers(spec)}; {_heads(spec)}"]
    if spec.assumed:
        lines.append(f"not in the file, so as its model type has it: {', '.join(spec.assumed)}")
    where = f"on each of {of.tensor_parallel} devices" if of.tensor_parallel > 1 else "on one device"
    lines.append(f"{of.memory_bytes:,} bytes ({of.memory_bytes / 2**30:.4g} GiB) for pages {where}")
    return lines


def table(plans: Sequence[Plan], contexts: Sequence[int]) -> list[str]:
    """Return the table: a line of names, then a line for each plan."""
    names = ["dtype", "page size", "bytes a token", "padding", "pages", "tokens"]
    rows = [[*names, *(f"seqs of {context:,}" for context in contexts), "longest sequence"]]
    rows += [_row(each, contexts) for each in plans]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in rows
    ]


def notes(plans: Sequence[Plan], context: int) -> list[str]:
    """Return notes that explain the figures."""
    one = plans[0]
    spec = one.spec
    most = max(plans, key=_last_page_bytes)
    lines = [
        f"A sequence's last page is up to page size - 1 tokens empty: at most {_last_page_bytes(most) / 2**20:.3g} MiB "
        f"a sequence ({most.dtype}, pages of {most.page_size})."
    ]
    for heads in dict.fromkeys(shape.num_kv_heads for shape in spec.shapes):
        if heads % one.tensor_parallel:
            asked = f"{one.tensor_parallel} devices do not divide {_count(heads, 'KV head')}"
            lines.append(f"{asked}: each of them holds all.")
    lines += _unused_views(one)
    if any(group.is_windowed for group in one.groups):
        without = len(one.groups) * -(-context // one.page_size)
        lines.append(
            f"A decoding sequence of {context:,} tokens holds {one.pages_of(context, 1):,} pages of {one.page_size}; "
            f"it would hold {without:,} if no layer released any."
        )
    return [f"- {line}" for line in lines]


def record(of: Plan, contexts: Sequence[int]) -> dict[str, Any]:
    """A plan as JSON."""
    derived = (
        "bytes_per_page",
        "bytes_per_token",
        "number_bytes_per_token",
        "scale_bytes_per_token",
        "padding_bytes_per_token",
        "num_pages",
        "num_tokens",
        "longest_sequence",
    )
    return {
        **dataclasses.asdict(of),
        **{name: getattr(of, name) for name in derived},
        "views": [dataclasses.asdict(shape) for shape in of.views],
        "groups": [dataclasses.asdict(group) for group in of.groups],
        "sequences": {str(context): of.sequences(context) for context in contexts},
    }


def _layers(spec: CacheSpec) -> str:
    sees = {"full": "full", "window": "with a window of {:,}", "chunked": "in chunks of {:,}"}
    parts = [f"{len(group.layers)} {sees[group.kind].format(group.tokens)}" for group in spec.groups]
    if spec.shared_layers:
        parts.append(f"{len(spec.shared_layers)} with the keys of others")
    return f"{spec.num_layers} layers ({', '.join(parts)})"


def _heads(spec: CacheSpec) -> str:
    """What layers store; with the number of layers, if they differ."""
    if len(spec.shapes) == 1:
        return _shape(spec.shapes[0])
    layers = {shape: sum(len(group.layers) for group in spec.groups if group.kv == shape) for shape in spec.shapes}
    return ", ".join(f"{_count(number, 'layer')} of {_shape(shape)}" for shape, number in layers.items())


def _shape(shape: KVShape) -> str:
    if shape.latent:
        return f"latent entries of {shape.head_dim}, of which {shape.v_head_dim or shape.head_dim} are the value"
    values = "" if shape.v_head_dim is None else f", values of {shape.v_head_dim}"
    return f"{_count(shape.num_kv_heads, 'KV head')} of {shape.head_dim}{values}"


def _unused_views(of: Plan) -> list[str]:
    """A note on the views that a page's own group does not use, if there are any."""
    views, groups, layers = len(of.views), len(of.groups), of.spec.num_stored_layers
    if (shapes := len(of.spec.shapes)) > 1:
        used = max(len(group.layers) for group in of.groups)
        return [f"A page takes room in all {views} views of {shapes} shapes, of which its group uses at most {used}."]
    empty = views * groups - layers
    return [f"{layers} layers in {groups} groups of {views} leave room for {empty} unused."] if empty else []


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _row(of: Plan, contexts: Sequence[int]) -> list[str]:
    padding = f"{100 * of.padding_bytes_per_token / of.bytes_per_token:.0f} %"
    numbers = [of.page_size, math.ceil(of.bytes_per_token), padding, of.num_pages, of.num_tokens]
    longest = "any" if of.longest_sequence == MAX_SIZE else of.longest_sequence
    cells = [*numbers, *(of.sequences(context) for context in contexts), longest]
    return [of.dtype, *(cell if isinstance(cell, str) else f"{cell:,}" for cell in cells)]


def _last_page_bytes(of: Plan) -> float:
    return (of.page_size - 1) * of.bytes_per_token
