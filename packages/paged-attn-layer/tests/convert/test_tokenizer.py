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
    with pytest.raises(ValueError, match=r"model.gguf is missing"):
        load_tokenizer(tmp_path / "model.gguf")


@pytest.mark.parametrize("broken", ["{", '{"version": "1.0"}', "[]"])
def test_a_broken_tokenizer(tmp_path, broken):
    (tmp_path / "tokenizer.json").write_text(broken)
    with pytest.raises(ValueError, match=r"has a tokenizer that cannot be read \(.+\); download it again"):
        load_tokenizer(tmp_path)
