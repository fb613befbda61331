import json

import paged_convert
import pytest
from safetensors.numpy import load_file
from tiny_checkpoints import random_weights, write_directory

from paged_attn_layer import load_model
from paged_attn_layer._src.convert_cli import main


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    write_directory(tmp_path / "source", random_weights())
    return tmp_path / "source"


def test_to_safetensors(source, tmp_path, capsys):
    assert main([str(source), str(tmp_path / "new"), "--dtype", "bfloat16"]) == 0
    assert {str(weight.dtype) for weight in load_file(tmp_path / "new" / "model.safetensors").values()} == {"bfloat16"}
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'new'}: 21 weights, 0.00 GB in ")
    assert "host memory rose by " in out
    assert "converting: 100%" in err


def test_to_orbax(source, tmp_path):
    assert main([str(source), str(tmp_path / "new"), "--to", "orbax"]) == 0
    assert (tmp_path / "new" / "orbax").is_dir()
    assert load_model(tmp_path / "new").config == load_model(source).config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SOURCE", "SOURCE"], "source exists already; give the path of a new directory\n"),
        (
            ["SOURCE/nowhere", "SOURCE/new"],
            "nowhere does not exist; give a Hugging Face model directory or a .gguf file",
        ),
    ],
)
def test_errors_are_one_line(source, capsys, options, message):
    assert main([option.replace("SOURCE", str(source)) for option in options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("paged-convert: ")
    assert message in said


def test_wrong_options(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["a", "b", "--to", "pickle"])
    assert "paged-convert: argument --to: invalid choice: 'pickle'" in capsys.readouterr().err


def test_the_entry_runs_the_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["paged-convert", "--help"])
    with pytest.raises(SystemExit, match="0"):
        paged_convert.main()
