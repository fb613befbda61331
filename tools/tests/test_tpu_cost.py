"""Runs the tool: errors of its options, output without compiling, and one workload with the real compiler."""

import importlib.util
import json
import sys

import pytest
import tpu_cost


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tpu_cost.py", *map(str, arguments)])
    tpu_cost.main()


def test_list_names_the_base_set(monkeypatch, capsys):
    run(monkeypatch, "--list")
    assert "decode-32-8-128-p16-c8192" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("decoding",), "must be MODE"),
        (("write", "--blocks", "64"), "must be ROWSxPAGES"),
        (("--chip", "v4"), "v4"),
        (("--model", "gpt-5"), "--model 'gpt-5' must be one of gpt-oss-20b, llama-3-70b, llama-3-8b"),
        (("--model", "tiny", "--topology", "v4:2x2x1"), "--topology 'v4:2x2x1' must begin with one of v5e, v6e, tpu7x"),
    ],
)
def test_wrong_options_are_refused(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_decode_is_costed_by_the_compiler(monkeypatch, capsys, tmp_path):
    cost = tmp_path / "cost.json"
    table = tmp_path / "cost.md"
    run(monkeypatch, "decode-8-1-128-p128-c8192", "--chip", "v6e", "--json", cost, "--markdown", table)
    [result] = json.loads(cost.read_text())["results"]
    assert result["failure"] is None
    assert result["figures"]["dmas"] >= 1
    assert result["figures"]["cycles"] == pytest.approx(sum(result["figures"]["path"].values()), rel=0.01)
    assert "| `decode-8-1-128-p128-c8192` | v6e |" in table.read_text()
    assert "decode-8-1-128-p128-c8192" in capsys.readouterr().out


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_model_is_compiled_for_a_slice(monkeypatch, capsys):
    options = ("--seqs", 4, "--context", 256, "--chunk", 64, "--no-attention")
    run(monkeypatch, "--model", "tiny", "--topology", "v5e:2x2", *options)
    out = capsys.readouterr().out
    assert "tiny on v5e:2x2: 4 devices" in out
    assert "a page 8,192 bytes" in out  # 16 tokens of a layer, a KV head, 128 elements of keys and of values, bfloat16
    decode = next(line for line in out.splitlines() if "decode" in line)
    assert "pages in place; collectives: 3 all-reduce" in decode  # after the embedding, attention and MLP
