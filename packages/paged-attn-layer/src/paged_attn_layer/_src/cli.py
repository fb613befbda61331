"""`paged-generate`: a command that answers a file of prompts with a model, from a paged KV cache."""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import stat
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from paged_attn_layer._src.command import Parser, run_command, tell
from paged_attn_layer._src.engine.completion import Completion
from paged_attn_layer._src.engine.config import DEFAULT_SEQUENCE_LENGTH, EngineConfig
from paged_attn_layer._src.engine.engine import Engine
from paged_attn_layer._src.engine.interrupts import hold_interrupts
from paged_attn_layer._src.engine.params import SamplingParams
from paged_attn_layer._src.engine.progress import ServingBar, optional_module
from paged_attn_layer._src.engine.report import plot, summary
from paged_attn_layer._src.engine.request import Request

NAME = "paged-generate"
DESCRIPTION = """\
Answer prompts with a model, by greedy decoding or sampling. Prompts join and leave the batch at any step
(continuous batching). Keys and values are kept in a paged cache. Prints each answer and the speed."""

EXAMPLES = """\
Each line of the prompts file (UTF-8) is a prompt or a JSON object. Empty lines are skipped.
  What is the capital of France?
  {"prompt": "Name three rivers.", "arrival": 12}
"arrival" is the number of the step at which the prompt arrives (default: 0).
Ctrl-C ends the run after the step that runs; answers that are finished are printed and written.

examples:
  paged-generate --model ~/models/SmolLM2-135M-Instruct --prompts prompts.txt
  paged-generate --model model.gguf --prompts prompts.jsonl --max-new-tokens 200 --stop "###"
  paged-generate --model model.gguf --prompts prompts.txt --temperature 0.7 --top-p 0.9 --seed 1
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, or 2 for an error that was reported, or 130 after Ctrl-C."""
    return run_command(build_parser(), run, argv, "try a smaller --num-pages, --max-seqs or --prefill-chunk")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's options."""
    sizes = EngineConfig()
    parser = Parser(
        prog=NAME,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, type=Path, help="a Hugging Face directory (safetensors), or a .gguf file")
    add("--prompts", required=True, type=Path, help="a file with one prompt a line, see below")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: %(default)s)")
    greedy = SamplingParams()
    add(
        "--temperature",
        type=float,
        default=greedy.temperature,
        metavar="T",
        help="0: the likeliest token is chosen; 1: tokens are drawn from the model's distribution (default: 0)",
    )
    add("--top-k", type=int, default=greedy.top_k, metavar="K", help="draw from the K likeliest tokens (default: all)")
    add(
        "--top-p",
        type=float,
        default=greedy.top_p,
        metavar="P",
        help="draw from the likeliest tokens whose probabilities add up to P (default: %(default)s)",
    )
    add(
        "--min-p",
        type=float,
        default=greedy.min_p,
        metavar="P",
        help="draw from tokens at least P times as likely as the likeliest (default: %(default)s)",
    )
    add("--seed", type=int, metavar="N", help="equal seeds give equal answers (default: another for each prompt)")
    add(
        "--stop",
        nargs="+",
        default=[],
        type=utf8_text,
        metavar="TEXT",
        help="end an answer before the first of these texts",
    )
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put prompts into the model's chat template (default: if it has one)",
    )
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="weights' type (default: %(default)s)")
    add(
        "--kv-dtype",
        choices=KV_DTYPES,
        help="type of the cached keys and values (default: as the weights); "
        "int4 saves memory over int8 only at head sizes above 64",
    )
    add("--page-size", type=int, default=sizes.page_size, metavar="N", help="tokens per page (default: %(default)s)")
    add("--num-pages", type=int, metavar="N", help="pages of the cache (default: enough for --max-seqs, or what fits)")
    add("--max-seqs", type=int, default=sizes.max_seqs, metavar="N", help="requests at once (default: %(default)s)")
    add(
        "--max-sequence-length",
        type=int,
        metavar="N",
        help=f"most tokens of a prompt and its answer (default: {DEFAULT_SEQUENCE_LENGTH}, or the model's most)",
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
    _check_outputs(args, len(lines))
    engine = _load(args, config)
    requests = [_request(engine, line, args) for line in lines]
    engine.warm_up(progress=True)
    try:
        with ServingBar(requests) as bar:
            engine.serve(requests, arrivals=[line.arrival for line in lines], on_step=bar.update)
    finally:  # after Ctrl-C or an error, what is finished is kept
        with hold_interrupts():
            _report(args, list(zip(lines, requests, strict=True)), engine)


def utf8_text(argument: str) -> str:
    """Returns an argument's text. Python reads UTF-8 as half surrogate pairs where the locale is ASCII.

    Raises:
        ValueError: it is neither text of the locale nor UTF-8.
    """
    try:
        argument.encode()
    except UnicodeEncodeError:
        return os.fsencode(argument).decode()
    return argument


def read_prompts(path: Path) -> list[PromptLine]:
    """Returns the prompts of a file. A line that starts with `{` is a JSON object.

    Lines end with a line feed, or carriage return and line feed. Other characters that some programs break lines at
    belong to the prompt. A byte order mark at the start belongs to no prompt.

    Raises:
        ValueError: the file has no prompt, or a line is wrong. The message names the line.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; give a file with one prompt per line") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path} is a directory; give a file with one prompt per line") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    lines = [
        _parse_line(path, number, line.strip(" \t\r"))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise ValueError(f"{path} has no prompts; write one prompt per line")
    return lines


def _parse_line(path: Path, number: int, line: str) -> PromptLine:
    if not line.startswith("{"):
        return PromptLine(number, line)
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} line {number} starts with {{ but is not JSON ({error}); write a prompt that starts with {{ as "
            '{"prompt": "..."}'
        ) from None
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


def _check_outputs(args: argparse.Namespace, num_prompts: int) -> None:
    """Raise now, before the model is loaded, if an output could not be written at the end."""
    optional_module("tqdm")
    files = {"--prompts": args.prompts, "--model": args.model, "--json": args.json, "--plot": args.plot}
    given = [(name, path) for name, path in files.items() if path]
    for (name, path), (other, same) in itertools.combinations(given, 2):
        if _is_one_file(path, same):
            raise ValueError(f"{name} and {other} are one file, {path}; give each its own")
    for path in filter(None, (args.plot, args.json)):
        if path.exists() and args.model.is_dir() and any(_is_one_file(path, part) for part in args.model.iterdir()):
            raise ValueError(f"{path} is a file of --model {args.model}; write to another")
        _check_writable(path)
    if args.plot:
        endings = optional_module("matplotlib.figure").Figure().canvas.get_supported_filetypes()
        if args.plot.suffix.removeprefix(".") not in endings:
            raise ValueError(f"--plot {args.plot} must end in one of .{', .'.join(endings)}")
    if sys.stdout is None:
        raise OSError("standard output is closed, and the answers go there; send it to a file or to /dev/null")
    _print(f"{num_prompts} prompts of {args.prompts}, model {args.model}")


def _is_one_file(path: Path, other: Path) -> bool:
    """True if two paths name one file, by links too; a file that is not there yet has its path alone."""
    if path.exists() and other.exists():
        return path.samefile(other) and not path.is_dir()
    return os.path.realpath(path) == os.path.realpath(other)


def _check_writable(path: Path) -> None:
    """Write 4 KiB to the file's end, and take them away again."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: {path.parent} is not a directory")
    if path.is_dir():
        raise IsADirectoryError(f"{path} cannot be written: it is a directory; name a file in it")
    existed = path.exists()
    if existed and stat.S_ISFIFO(path.stat().st_mode):
        return  # its reader may not be there yet
    try:
        with path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END) if file.seekable() else 0
            file.write(b" " * 4096)
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                file.truncate(size)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        if not existed:
            Path(os.path.realpath(path)).unlink(missing_ok=True)


def _print(text: str) -> None:
    """Print at once.

    Raises:
        OSError: standard output cannot be written, for instance because the disk is full.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # else Python writes the rest again when it ends, and fails
        raise OSError(f"standard output cannot be written: {error.strerror}") from None


def _load(args: argparse.Namespace, config: EngineConfig) -> Engine:
    _tell(f"loading {args.model}")
    started = time.perf_counter()
    engine = Engine.load(args.model, config=config, dtype=args.dtype, warm_up=False)
    _tell(f"loaded in {time.perf_counter() - started:.1f} s")
    return engine


def _request(engine: Engine, line: PromptLine, args: argparse.Namespace) -> Request:
    try:
        return engine.request(line.prompt, _sampling(args), chat=args.chat)
    except ValueError as error:
        raise ValueError(f"{args.prompts} line {line.number}: {error}") from None


def _sampling(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        stop=args.stop,
    )


def _report(args: argparse.Namespace, served: list[tuple[PromptLine, Request]], engine: Engine) -> None:
    """Print and write the finished answers. If one output cannot be written, the others are.

    Raises:
        OSError: an output cannot be written.
        ValueError: a tokenizer could not give an answer's text.
    """
    answers = [(line, Completion.of(request)) for line, request in served if request.finish_reason is not None]
    answers = [(line, completion) for line, completion in answers if completion.finish_reason != "aborted"]
    if len(answers) < len(served):
        _tell(f"{len(answers)} of {len(served)} answers are finished, and are kept")
    failures = []
    for output in (_print_summary, _write_json, _write_plot):
        try:
            output(args, answers, engine)
        except OSError as error:
            failures.append(str(error))
    if failures:
        raise OSError("; ".join(failures))
    errors = [f"line {line.number}: {completion.error}" for line, completion in answers if completion.error]
    if errors:
        raise ValueError(f"{len(errors)} answers could not be turned into text: {'; '.join(errors)}")


def _print_summary(args: argparse.Namespace, answers: list[tuple[PromptLine, Completion]], engine: Engine) -> None:
    _print(summary([line.prompt for line, _ in answers], [completion for _, completion in answers], engine.stats))


def _write_json(args: argparse.Namespace, answers: list[tuple[PromptLine, Completion]], engine: Engine) -> None:
    if args.json:
        entries = [
            {"line": line.number, "prompt": line.prompt, **dataclasses.asdict(completion)}
            for line, completion in answers
        ]
        steps = [dataclasses.asdict(step) for step in engine.stats.steps]
        args.json.write_text(json.dumps({"answers": entries, "steps": steps}, indent=1) + "\n", encoding="utf-8")
        _print(f"answers and steps: {args.json}")


def _write_plot(args: argparse.Namespace, answers: list[tuple[PromptLine, Completion]], engine: Engine) -> None:
    if args.plot:
        plot(engine.stats, engine.num_pages, args.plot)
        _print(f"pages and tokens of each step: {args.plot}")


def _tell(message: str) -> None:
    tell(NAME, message)


if __name__ == "__main__":
    sys.exit(main())
