"""vLLM's side of a run, in a process of its own that takes its turns when it is told to."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache_costing.workloads import Turn, Workload

_TOOLS = Path(__file__).parent.parent


class PeerError(Exception):
    """The peer's process ended without an answer; the message is the last line it wrote."""


class Peer:
    """A Python that has vLLM, at work on the same workloads."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start it and wait until vLLM is imported.

        Args:
            command: what runs `vllm_peer`, for instance `[python, "-m", "cache_costing.vllm_peer"]`.

        Raises:
            PeerError: it does not start, or cannot import vLLM.
        """
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._stderr}
        alone = {**os.environ, "PYTHONPATH": str(_TOOLS)}  # its packages are its own
        try:
            self._process = subprocess.Popen(command, text=True, env=alone, **streams)
        except OSError as error:
            self._stderr.close()
            raise PeerError(str(error)) from error
        about = self._answer()
        self.version: str = about["version"]
        self.kinds: list[str] = about["kinds"]

    def prepare(self, work: Workload) -> Turn:
        """Make it ready for a workload; one turn of it.

        Raises:
            PeerError: it fails; and so does the turn.
        """
        self._ask({"prepare": work.name})
        return lambda: self._ask({"turn": None})

    def close(self) -> None:
        """End it."""
        if not self._stderr.closed:
            self._process.communicate()
            self._stderr.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        stdin = self._process.stdin
        assert stdin is not None  # it was opened as a pipe
        print(json.dumps(question), file=stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            self._process.communicate()
            self._stderr.seek(0)
            lines = self._stderr.read().split("\n")
            self._stderr.close()
            raise PeerError(next((each for each in reversed(lines) if each.strip()), "it said nothing"))
        return json.loads(line)
