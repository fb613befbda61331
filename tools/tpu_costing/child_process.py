"""Runs a module of this package in its own process. The question and the answer are JSON."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).parent.parent
_ERROR = re.compile(r"^(?:F\d+ .*\] )?((?:[\w.]*(?:Error|Exception)|Static LLO profiling)\b.*)", re.MULTILINE)
_REASONS = (
    ("No DMA issue node", "copies lost: the cost model has no DMA that is issued in a branch's delay slots"),
    ("LLO_CHECK failure", "a check inside the cost model fails"),
    ("Unsupported DMA direction", "the cost model does not know this copy"),
    (r"^AssertionError", "an assertion fails"),
    ("XLA fully tiled", "heads not tiled"),
    (r"divisib|multiple|align|tiled|layout|shape cast|Slice", "head size unaligned"),
    (r"[Vv]mem", "VMEM too small"),
    (r"[Ss]mem", "SMEM too small"),
    ("Mosaic failed to compile", "does not compile"),
    (r"pages_per_compute_block|num_kv_pages_per_block", "block too large"),
    (r"[Dd]type|type|float8|int8", "type not supported"),
)
"""A pattern of an error's text, and a few words for it. The first that matches counts."""


class ChildError(Exception):
    """The process ended without an answer. The message is its last error."""


def ask(module: str, question: Any, **environment: str) -> Any:
    """Returns the last line that `python -m tpu_costing.MODULE QUESTION` prints, read as JSON.

    The exit status is ignored, because libtpu may abort a process after it has done all its work.

    Raises:
        ChildError: the process printed no answer.
    """
    path = os.pathsep.join(filter(None, (str(TOOLS), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", f"tpu_costing.{module}", json.dumps(question)]
    variables = {**os.environ, **environment, "PYTHONPATH": path}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        raise ChildError(last_error(done.stderr))
    return json.loads(lines[-1])


def answer(fields: dict[str, Any]) -> None:
    """Print the answer. The child process calls this."""
    print("\n" + json.dumps(fields), flush=True)


def last_error(stderr: str) -> str:
    """Returns the exception that ended the process, or the last words of a compiler that aborted."""
    errors = _ERROR.findall(stderr)
    return errors[-1] if errors else stderr[-500:]


def in_three_words(error: str) -> str:
    """Returns a few words for an error of a compiler or kernel. A long `NotImplementedError` is returned whole."""
    name, _, message = error.partition(": ")
    if name == "NotImplementedError":
        return message if len(message.split()) <= 3 else error
    for pattern, words in _REASONS:
        if re.search(pattern, error):
            return words
    return " ".join(error.split()[:6])
