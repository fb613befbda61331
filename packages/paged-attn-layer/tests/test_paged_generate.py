"""Ctrl-C at every moment of the command's life, in real processes."""

import os
import signal
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-c", "import sys; from paged_generate import main; sys.exit(main())"]
SLOW_MODULE = "import time; print('here', flush=True); time.sleep(60)"
LOSES_CTRL_C = f"try:\n exec({SLOW_MODULE!r})\nexcept BaseException:\n pass"


def started(tmp_path, modules, *options, command=COMMAND):
    """The command with stand-ins for some modules, once it has said `here`."""
    for name, code in modules.items():
        (tmp_path / f"{name}.py").write_text(code)
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.Popen(
        [*command, *options],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    said = process.stdout.readline()
    if said != "here\n":
        process.kill()
        pytest.fail(process.communicate()[1])
    return process


def interrupted(process):
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    return process.returncode, said


@pytest.mark.parametrize("code", [SLOW_MODULE, LOSES_CTRL_C], ids=["usual", "loses exceptions"])
def test_while_modules_are_imported(tmp_path, code):
    assert interrupted(started(tmp_path, {"jax": code})) == (130, "paged-generate: interrupted\n")


FAKE_CLI = """
import sys, types
def run(): {code}
cli = types.ModuleType("paged_attn_layer._src.cli")
cli.main = run
for name in ("paged_attn_layer", "paged_attn_layer._src"): sys.modules[name] = types.ModuleType(name)
sys.modules["paged_attn_layer._src"].cli = sys.modules["paged_attn_layer._src.cli"] = cli
"""
"""A stand-in for the command's modules: how the entry treats them does not depend on jax."""


def with_cli(code):
    return {"sitecustomize": FAKE_CLI.format(code=code)}


def test_while_the_command_runs(tmp_path):
    """The exception comes, so that what is finished can be kept."""
    code = f"\n try: exec({SLOW_MODULE!r})\n except KeyboardInterrupt: print('kept', file=sys.stderr); raise"
    assert interrupted(started(tmp_path, with_cli(code))) == (130, "kept\n")


def test_after_the_command_ended(tmp_path):
    code = f"import atexit; atexit.register(lambda: exec({SLOW_MODULE!r})); return 0"
    assert interrupted(started(tmp_path, with_cli(code))) == (130, "paged-generate: interrupted\n")


def test_ctrl_c_that_is_not_for_it(tmp_path):
    """A shell starts what runs in its background with Ctrl-C ignored."""
    code = "import time; print('here', flush=True); time.sleep(0.5); return 7"
    in_background = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *COMMAND]
    assert interrupted(started(tmp_path, with_cli(code), command=in_background)) == (7, "")


def test_options_reach_the_command(tmp_path):
    process = started(tmp_path, with_cli("print('here', flush=True); sys.exit(sys.argv[1:] != ['--help'])"), "--help")
    process.communicate(timeout=30)
    assert process.returncode == 0


IMPORTED = """
import sys, threading, time
def say():
    while not hasattr(sys.modules.get("paged_attn_layer._src.cli"), "main"): time.sleep(0.01)
    time.sleep(0.2)
    print("here", flush=True)
threading.Thread(target=say, daemon=True).start()
"""


def test_with_its_own_modules(tmp_path):
    """It waits for prompts from a pipe."""
    os.mkfifo(tmp_path / "prompts")
    options = ["--model", "nowhere", "--prompts", str(tmp_path / "prompts")]
    assert interrupted(started(tmp_path, {"sitecustomize": IMPORTED}, *options)) == (
        130,
        "paged-generate: interrupted\n",
    )
