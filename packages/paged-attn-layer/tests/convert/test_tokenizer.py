import json
import os

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from paged_attn_layer._src.convert.tokenizer import load_tokenizer


def test_a_directory(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", eos_token="b").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == [0]
    assert tokenizer.eos_token_id == 1


def test_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer: none of tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"model.gguf does not exist"):
        load_tokenizer(tmp_path / "model.gguf")


UNKNOWN_KIND = json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "Telepathy", "vocab": {}}})


@pytest.mark.parametrize("broken", ["{", '{"version": "1.0"}', "[]", "[" * 10**5, UNKNOWN_KIND, '"\\ud800"'])
def test_a_broken_tokenizer(tmp_path, broken):
    (tmp_path / "tokenizer.json").write_text(broken)
    with pytest.raises(ValueError, match=r"has a tokenizer that cannot be read \(.+\); download it again"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is not a regular file"):
        load_tokenizer(tmp_path)


def test_code_beside_a_tokenizer_is_not_run(tmp_path):
    """Nor does transformers ask at the terminal if it may."""
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(ValueError, match="has a tokenizer that cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.gguf"])
def test_nothing_there(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} does not exist; give a Hugging Face model directory or a .gguf file"):
        load_tokenizer(tmp_path / name)


def test_settings_of_a_wrong_type_are_told_when_it_is_loaded(tmp_path):
    """They show in the first use only."""
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": "4096"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"has a tokenizer that cannot be read .*; download it again"):
        load_tokenizer(tmp_path)
