import json
import os
import subprocess
import sys

import pytest

from paged_cache._src.planning.cli import main, size

LLAMA_3_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
}
GEMMA_3_4B = {"text_config": {"model_type": "gemma3_text", "num_hidden_layers": 34, "sliding_window": 1024}}


@pytest.fixture
def command(tmp_path, capsys):
    """Runs the command on a config; returns its exit code and what it prints on either stream."""
    path = tmp_path / "config.json"

    def call(config, *options):
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        try:
            code = main(["plan", "--model-config", str(path), *options])
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return call


def test_the_table_of_a_model_with_full_attention(command):
    options = ("--memory", "16GiB", "--page-size", "16", "--dtype", "bfloat16", "int8", "--context", "2048", "8192")
    code, out, err = command(LLAMA_3_8B, *options)
    assert (code, err) == (0, "")
    assert out == (
        "config.json: 32 layers (32 full); 8 KV heads of 128\n"
        "17,179,869,184 bytes (16 GiB) for pages on one device\n"
        "\n"
        "dtype     page size  bytes a token  padding   pages   tokens  seqs of 2,048  seqs of 8,192  longest sequence\n"
        "bfloat16         16        131,072      0 %   8,192  131,056             63             15           131,056\n"
        "int8             16         73,728      8 %  14,563  232,992            113             28           232,992\n"
        "\n"
        "- A sequence's last page is up to page size - 1 tokens empty: at most 1.88 MiB a sequence (bfloat16, pages of "
        "16).\n"
    )


def test_notes_of_windows_and_what_the_file_leaves_out(command):
    _, out, _ = command(GEMMA_3_4B, "--memory", "16GiB", "--tensor-parallel", "3", "--page-size", "16")
    assert "34 layers (29 with a window of 1,024, 5 full); 4 KV heads of 256\n" in out
    assert "as its model type has it: sliding_window_pattern=6, num_key_value_heads=4, head_dim=256\n" in out
    assert "for pages on each of 3 devices\n" in out
    assert "- 3 devices do not divide 4 KV heads: each of them holds all.\n" in out
    assert "- 34 layers in 7 groups of 5 leave room for 1 unused.\n" in out
    held = 2048 + 6 * 65
    assert f"of 32,768 tokens holds {held:,} pages of 16; it would hold {7 * 2048:,} if no layer" in out


def test_layers_of_two_shapes_and_layers_that_store_none(command):
    config = {"model_type": "gemma4_text", "num_hidden_layers": 12, "num_key_value_heads": 2, "head_dim": 256}
    config |= {"sliding_window": 512, "num_kv_shared_layers": 6}
    _, out, _ = command(config, "--memory", "1GB", "--tensor-parallel", "2", "--page-size", "16", "--context", "512")
    assert (
        "12 layers (5 with a window of 512, 1 full, 6 with the keys of others); 5 layers of 2 KV heads of 256, " in out
    )
    assert ", 1 layer of 2 KV heads of 512\n" in out
    assert "- A page takes room in all 2 views of 2 shapes, of which its group uses at most 1.\n" in out
    assert out.splitlines()[5].split()[2] == f"{6 * (512 + 1024) * 2:,}"


def test_a_latent_model_with_windows_alone(command):
    latent = LLAMA_3_8B | {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    options = ("--memory", "1GB", "--tensor-parallel", "2", "--set", "sliding_window=64", "model_type=mistral")
    _, out, _ = command(latent, *options)
    assert "32 layers (32 with a window of 64); latent entries of 576, of which 512 are the value\n" in out
    assert "2 devices do not divide 1 KV head" in out
    assert out.splitlines()[4].endswith("  any")


def test_json(command):
    code, out, _ = command(GEMMA_3_4B, "--memory", "16GiB", "--context", "2048", "--json")
    plans = json.loads(out)
    assert code == 0
    assert [each["page_size"] for each in plans] == [16, 32, 64]
    first = plans[0]
    assert first["bytes_per_page"] * first["num_pages"] <= first["memory_bytes"] == 16 * 2**30
    admitting, decoding = 128 + 6 * 97, 128 + 6 * 65
    assert first["sequences"] == {"2048": 1 + (first["num_pages"] - 1 - admitting) // decoding}
    assert [group["kind"] for group in first["groups"]] == ["window"] * 6 + ["full"]


def test_set_says_what_the_file_does_not(command):
    code, out, _ = command({}, "--memory", "1GiB", "--set", *(f"{key}={value}" for key, value in LLAMA_3_8B.items()))
    assert code == 0
    assert "32 layers (32 full); 8 KV heads of 128\n" in out


@pytest.mark.parametrize(
    ("text", "expected"),
    [("16GiB", 16 * 2**30), ("16GB", 16 * 10**9), ("500 MB", 5 * 10**8), ("1.5KiB", 1536), ("4096", 4096), ("7B", 7)],
)
def test_sizes(text, expected):
    assert size(text) == expected


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (LLAMA_3_8B, (), "the following arguments are required: --memory"),
        (
            LLAMA_3_8B,
            ("--memory", "16G"),
            "argument --memory: '16G' must be a number of bytes, or with a unit as in 16GiB",
        ),
        (LLAMA_3_8B, ("--memory", "-1"), "argument --memory: '-1' must be a number of bytes"),
        (LLAMA_3_8B, ("--memory", "1MB"), "memory_bytes=1,000,000 must hold the null page and one more"),
        (LLAMA_3_8B, ("--memory", "1GB", "--dtype", "int3"), "argument --dtype: invalid choice: 'int3'"),
        (LLAMA_3_8B, ("--memory", "1GB", "--page-size", "0"), "page_size=0 must be"),
        (LLAMA_3_8B, ("--memory", "1GB", "--context", "0"), "context=0 must be"),
        (LLAMA_3_8B, ("--memory", "1GB", "--set", "head_dim"), "argument --set: 'head_dim' must be KEY=VALUE"),
        ({}, ("--memory", "1GB"), "whole number of at least 1, so add it (--set KEY=VALUE sets a key of config.json)"),
        (LLAMA_3_8B | {"index_topk": 2048}, ("--memory", "1GB"), "a model with index_topk is not supported"),
        ("{", ("--memory", "1GB"), "config.json is not JSON"),
        ("[]", ("--memory", "1GB"), "config.json holds a list, not an object"),
    ],
)
def test_errors_are_one_line(command, config, options, message):
    code, out, err = command(config, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("python -m paged_cache plan: ")
    assert message in err


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert main(["plan", "--model-config", str(tmp_path / "none.json"), "--memory", "1GB"]) == 2
    assert "No such file or directory" in capsys.readouterr().err


def test_runs_as_a_module_and_asks_for_no_device(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_3_8B))
    run = subprocess.run(
        [sys.executable, "-m", "paged_cache", "plan", "--model-config", str(path), "--memory", "16GiB"],
        env={**os.environ, "JAX_PLATFORMS": "none"},  # whoever asks for a device fails
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "bfloat16         16        131,072" in run.stdout


@pytest.mark.parametrize("layers", [10_001, 10**9, 10**18])
def test_more_layers_than_any_model_has_are_refused_at_once(command, layers):
    code, out, err = command(LLAMA_3_8B, "--memory", "16GiB", "--set", f"num_hidden_layers={layers}")
    assert (code, out) == (2, "")
    assert f"num_hidden_layers={layers} must be at most 10000 (--set KEY=VALUE" in err
