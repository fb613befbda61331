"""vLLM's side of a run: a process that takes a turn when it is told to."""

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
    """The peer's process ended without an answer. The message is the last line that it wrote."""


class Peer:
    """A process with vLLM that runs the same workloads."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start the process and wait until it has imported vLLM.

        Args:
            command: the command that runs `vllm_peer`, such as `[python, "-m", "cache_costing.vllm_peer"]`.

        Raises:
            PeerError: the process does not start, or cannot import vLLM.
        """
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._stderr}
        alone = {**os.environ, "PYTHONPATH": str(_TOOLS)}  # it must not see our packages
        try:
            self._process = subprocess.Popen(command, text=True, env=alone, **streams)
        except OSError as error:
            self._stderr.close()
            raise PeerError(str(error)) from error
        about = self._answer()
        self.version: str = about["version"]
        self.kinds: list[str] = about["kinds"]

    def prepare(self, work: Workload) -> Turn:
        """Prepare a workload. Returns one turn of it.

        Raises:
            PeerError: the process fails. The turn raises it too.
        """
        self._ask({"prepare": work.name})
        return lambda: self._ask({"turn": None})

    def close(self) -> None:
        """End the process."""
        if not self._stderr.closed:
            self._process.communicate()
            self._stderr.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        stdin = self._process.stdin
        assert stdin is not None  # it is a pipe
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
            raise PeerError(next((each for each in reversed(lines) if each.strip()), "it wrote nothing"))
        return json.loads(line)
