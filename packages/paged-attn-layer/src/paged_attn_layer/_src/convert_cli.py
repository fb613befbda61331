"""`paged-convert`: a command that writes a checkpoint in another form, as `convert_checkpoint` does."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from paged_attn_layer._src.command import Parser, run_command, tell
from paged_attn_layer._src.convert.save import FORMATS, ConversionReport, convert_checkpoint

NAME = "paged-convert"
DESCRIPTION = """\
Write a checkpoint in another form, without torch. It is checked against its model first. The new directory is there
when all is written, and not before. paged-generate and load_model read all of these."""

EXAMPLES = """\
SRC is one of
  a Hugging Face directory (safetensors), also in fp8 with blocks or in mxfp4: these become plain weights
  a .gguf file
  a directory that this command wrote

examples:
  paged-convert model.gguf model-hf --dtype bfloat16     # transformers reads model-hf
  paged-convert model-hf model-orbax --to orbax          # loads shard by shard onto a mesh
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, or 2 for an error that was reported, or 130 after Ctrl-C."""
    advice = "orbax needs the whole model in memory; --to safetensors needs one weight at a time"
    return run_command(build_parser(), run, argv, advice)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=NAME, description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    parser.add_argument("source", type=Path, metavar="SRC", help="what is read, see below")
    parser.add_argument("directory", type=Path, metavar="DST", help="the new directory")
    parser.add_argument("--to", choices=FORMATS, default="safetensors", help="what is written (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights (default: as they are; quantised ones become float32)",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Convert, and print what was done.

    Raises:
        ValueError, NotImplementedError: the source or an option cannot be used.
        OSError: the new directory cannot be written.
        ModuleNotFoundError: an extra is not installed.
    """
    report = convert_checkpoint(
        args.source, args.directory, to=args.to, dtype=args.dtype, progress=sys.stderr is not None
    )
    for note in report.notes:
        tell(NAME, f"{args.directory} has {note}")
    print(f"{args.directory}: {summary(report)}", flush=True)


def summary(report: ConversionReport) -> str:
    """The report in one line."""
    rate = report.num_bytes / max(report.seconds, 1e-9)
    line = f"{report.num_weights} weights, {report.num_bytes / 1e9:.2f} GB in {report.seconds:.1f} s"
    memory = "" if report.host_memory is None else f", host memory rose by {report.host_memory / 1e6:.0f} MB at most"
    return f"{line} ({rate / 1e6:.0f} MB/s){memory}"


if __name__ == "__main__":
    sys.exit(main())
