"""Two processes, each with two CPU devices of one mesh, as two hosts of a cluster would be."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).parent / "support" / "one_of_two.py"
SECONDS = 120  # on two idle cores it takes a tenth of that


def start(process, address, log):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": str(process + 1)}
    command = [sys.executable, "-W", "error", str(SCRIPT), str(process), address]
    return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_two_processes_decide_alike_and_hold_the_same_pages(tmp_path):
    """What the processes check themselves is in `one_of_two.py`; what both have said is shown if one fails."""
    address, logs = f"127.0.0.1:{free_port()}", [tmp_path / name for name in ("0", "1")]
    processes = []
    try:
        for number, log in enumerate(logs):
            with log.open("w") as file:
                processes.append(start(number, address, file))
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and {p.poll() for p in processes} in ({None}, {None, 0}):  # none has failed
            time.sleep(0.1)
    finally:
        for each in processes:
            each.kill()
    said = "".join(f"\n--- process {number}\n{log.read_text()}" for number, log in enumerate(logs))
    assert [p.wait() for p in processes] == [0, 0], said
