"""`paged-generate`: a command that answers a file of prompts with a model, from a paged KV cache."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax

from paged_attn_layer._src.engine.completion import Completion
from paged_attn_layer._src.engine.config import EngineConfig
from paged_attn_layer._src.engine.engine import Engine
from paged_attn_layer._src.engine.progress import ServingBar, optional_module
from paged_attn_layer._src.engine.report import plot, summary
from paged_attn_layer._src.engine.request import Request

DESCRIPTION = """\
Answer prompts with a Llama-family model, by greedy decoding. Prompts join and leave the batch at any step
(continuous batching). Keys and values are kept in a paged cache. Prints each answer and the speed."""

EXAMPLES = """\
Each line of the prompts file is a prompt or a JSON object. Empty lines are skipped.
  What is the capital of France?
  {"prompt": "Name three rivers.", "arrival": 12}
"arrival" is the number of the step at which the prompt arrives (default: 0).

examples:
  paged-generate --model ~/models/SmolLM2-135M-Instruct --prompts prompts.txt
  paged-generate --model model.gguf --prompts prompts.jsonl --max-new-tokens 200 --stop "###"
  paged-generate --model model.gguf --prompts prompts.txt --max-seqs 32 --num-pages 4096 --plot run.png --json run.json
"""

KV_DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2", "int4")


@dataclasses.dataclass(frozen=True)
class PromptLine:
    """One prompt of a prompts file."""

    number: int
    """Line number, from 1."""
    prompt: str
    arrival: int = 0
    """Number of the step at which the prompt arrives."""


class _Parser(argparse.ArgumentParser):
    """Reports an error of the options in one line, without the long usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, or 2 for an error that was reported, or 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, NotImplementedError, OSError, ModuleNotFoundError) as error:
        _tell(str(error))
        return 2
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        reason = str(error) or "out of memory"
        _tell(f"this machine cannot run it ({reason}); try a smaller --num-pages, --max-seqs or --prefill-chunk")
        return 2
    except KeyboardInterrupt:
        _tell("interrupted")
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's options."""
    sizes = EngineConfig()
    parser = _Parser(
        prog="paged-generate",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, type=Path, help="a Hugging Face directory (safetensors), or a .gguf file")
    add("--prompts", required=True, type=Path, help="a file with one prompt a line, see below")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: %(default)s)")
    add("--stop", nargs="+", default=[], metavar="TEXT", help="end an answer before the first of these texts")
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put prompts into the model's chat template (default: if it has one)",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="weights' type (default: %(default)s)")
    add("--kv-dtype", choices=KV_DTYPES, help="type of the cached keys and values (default: as the weights)")
    add("--page-size", type=int, default=sizes.page_size, metavar="N", help="tokens per page (default: %(default)s)")
    add("--num-pages", type=int, metavar="N", help="pages of the cache (default: enough for --max-seqs, or what fits)")
    add("--max-seqs", type=int, default=sizes.max_seqs, metavar="N", help="requests at once (default: %(default)s)")
    add(
        "--max-sequence-length",
        type=int,
        default=sizes.max_sequence_length,
        metavar="N",
        help="most tokens of a prompt and its answer (default: %(default)s)",
    )
    add(
        "--prefill-chunk",
        type=int,
        default=sizes.prefill_chunk,
        metavar="N",
        help="prompt tokens that fit into a step beside all decodes (default: %(default)s)",
    )
    add("--plot", type=Path, metavar="PATH", help="draw pages in use and tokens of each step into this image")
    add("--json", type=Path, metavar="PATH", help="write the answers and the figures of each step to this file")
    return parser


def run(args: argparse.Namespace) -> None:
    """Load the model, answer the prompts, print and write the results.

    Raises:
        ValueError: an option, a prompt or the model cannot be used.
        OSError: a file cannot be read or written.
        ModuleNotFoundError: an extra is not installed.
    """
    lines = read_prompts(args.prompts)
    config = EngineConfig(
        max_seqs=args.max_seqs,
        max_sequence_length=args.max_sequence_length,
        page_size=args.page_size,
        num_pages=args.num_pages,
        prefill_chunk=args.prefill_chunk,
        kv_dtype=args.kv_dtype,
    )
    _check_outputs(args)
    engine = _load(args, config)
    requests = [_request(engine, line, args) for line in lines]
    engine.warm_up(progress=True)
    with ServingBar(requests) as bar:
        completions = engine.serve(requests, arrivals=[line.arrival for line in lines], on_step=bar.update)
    print(summary([line.prompt for line in lines], completions, engine.stats))
    _write_files(args, lines, completions, engine)


def read_prompts(path: Path) -> list[PromptLine]:
    """Returns the prompts of a file. A line that starts with `{` is a JSON object.

    Raises:
        ValueError: the file has no prompt, or a line is wrong. The message names the line.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; give a file with one prompt per line") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    lines = [
        _parse_line(path, number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()
    ]
    if not lines:
        raise ValueError(f"{path} has no prompts; write one prompt per line")
    return lines


def _parse_line(path: Path, number: int, line: str) -> PromptLine:
    if not line.startswith("{"):
        return PromptLine(number, line)
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {number} starts with {{ but is not JSON: {error}") from None
    unknown = sorted(entry.keys() - {"prompt", "arrival"})
    if unknown or not isinstance(entry.get("prompt"), str):
        raise ValueError(
            f'{path} line {number} must be like {{"prompt": "text", "arrival": 0}}, with nothing else'
            + (f"; it has {', '.join(unknown)}" if unknown else "")
        )
    arrival = entry.get("arrival", 0)
    if not isinstance(arrival, int) or isinstance(arrival, bool) or arrival < 0:
        raise ValueError(f"{path} line {number} has arrival={arrival!r}; it must be a step number, at least 0")
    return PromptLine(number, entry["prompt"], arrival)


def _check_outputs(args: argparse.Namespace) -> None:
    """Raise now, before the model is loaded, if an output file could not be written at the end."""
    optional_module("tqdm")
    for path in (args.plot, args.json):
        if path and not path.parent.is_dir():
            raise FileNotFoundError(f"{path} cannot be written: {path.parent} is not a directory")
        if path and path.is_dir():
            raise IsADirectoryError(f"{path} cannot be written: it is a directory; name a file in it")
    if args.plot:
        endings = optional_module("matplotlib.figure").Figure().canvas.get_supported_filetypes()
        if args.plot.suffix.removeprefix(".") not in endings:
            raise ValueError(f"--plot {args.plot} must end in one of .{', .'.join(endings)}")


def _load(args: argparse.Namespace, config: EngineConfig) -> Engine:
    _tell(f"loading {args.model}")
    started = time.perf_counter()
    engine = Engine.load(args.model, config=config, dtype=args.dtype, warm_up=False)
    _tell(f"loaded in {time.perf_counter() - started:.1f} s")
    return engine


def _request(engine: Engine, line: PromptLine, args: argparse.Namespace) -> Request:
    try:
        return engine.request(line.prompt, max_new_tokens=args.max_new_tokens, stop=args.stop, chat=args.chat)
    except ValueError as error:
        raise ValueError(f"{args.prompts} line {line.number}: {error}") from None


def _write_files(
    args: argparse.Namespace, lines: list[PromptLine], completions: list[Completion], engine: Engine
) -> None:
    if args.plot:
        plot(engine.stats, engine.num_pages, args.plot)
        print(f"\npages and tokens of each step: {args.plot}")
    if args.json:
        answers = [
            {"line": line.number, "prompt": line.prompt, **dataclasses.asdict(completion)}
            for line, completion in zip(lines, completions, strict=True)
        ]
        steps = [dataclasses.asdict(step) for step in engine.stats.steps]
        args.json.write_text(json.dumps({"answers": answers, "steps": steps}, indent=1) + "\n")
        print(f"answers and steps: {args.json}")


def _tell(message: str) -> None:
    print(f"paged-generate: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
