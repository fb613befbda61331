"""Hostile checkpoints and prompts files: each is refused by an error of ours, or gives what the right one gives."""

import json
import shutil

import numpy as np
import pytest
from flax import nnx
from fuzzing import BYTES, JSON, REFUSED, attempt, fuzzed
from gguf_mutators import GGUF, described
from tiny_checkpoints import random_weights, write_directory
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from paged_attn_layer import load_model, load_tokenizer, read_config
from paged_attn_layer._src.cli import read_prompts

TOKENS = ["<unk>", "<s>", "</s>", *"ab\u012012'sN", "ab", "\u0120ab", "12"]
GGUF_SETTINGS = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 16,
    "llama.feed_forward_length": 24,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.dimension_count": 4,
    "llama.vocab_size": 32,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (len(TOKENS) - 3)],
    "tokenizer.ggml.merges": ["a b", "\u0120 ab", "1 2"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}
PIECES = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581ab", *map("<0x{:02X}>".format, range(8))]
SENTENCEPIECE = {
    **GGUF_SETTINGS,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.scores": [*[0.0] * 3, -1.0, -2.0, -3.0, -0.5, -0.25, *[0.0] * 8],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1, *[6] * 8],
}
WEIGHTS = random_weights()
FILE = described(GGUF_SETTINGS, WEIGHTS)
OF_SENTENCEPIECE = described(SENTENCEPIECE, WEIGHTS)
TEXT = "ab a1 's\u00e4 </s>"


def weights_of(model):
    return {".".join(map(str, keys)): np.asarray(w[...]) for keys, w in nnx.to_flat_state(nnx.state(model))}


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A right directory with two shards, and the weights of its model."""
    path = tmp_path_factory.mktemp("right")
    write_directory(path, WEIGHTS, shards=2, eos_token_id=2, rope_scaling={"type": "linear", "factor": 2.0})
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "bos_token_id": 1}))
    bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3, "?": 4}, [("a", "b")], unk_token="?"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", unk_token="?").save_pretrained(path)
    return path, weights_of(load_model(path))


@pytest.fixture
def copied(right, tmp_path):
    return shutil.copytree(right[0], tmp_path / "model")


def loaded(path, want, *names):
    """True if the model is read; then it has the right weights."""
    if (model := attempt(lambda: load_model(path), *names)) is REFUSED:
        return False
    got = weights_of(model)
    assert got.keys() == want.keys()
    for name, weight in want.items():
        np.testing.assert_array_equal(got[name], weight)
    return True


def encoded(path, *names):
    """True if the tokenizer is read; then it works."""
    if (tokenizer := attempt(lambda: load_tokenizer(path), *names)) is REFUSED:
        return False
    ids = tokenizer.encode(TEXT)
    assert all(type(each) is int and 0 <= each < len(tokenizer) for each in ids)
    assert isinstance(tokenizer.decode(ids), str)
    return True


def test_right_files(right, tmp_path):
    """What the cases are made of is read."""
    for file in (FILE, OF_SENTENCEPIECE):
        path = tmp_path / "m.gguf"
        path.write_bytes(file.to_bytes())
        assert loaded(path, right[1])
        assert encoded(path)
    assert encoded(right[0])


def as_gguf(case, file, path):
    path.write_bytes(case(file))
    return path


@fuzzed(GGUF, quick=17, most=400)
def test_gguf(case, right, tmp_path):
    path = as_gguf(case, FILE, tmp_path / "m.gguf")
    loaded(path, right[1], path)
    encoded(path, path)


@fuzzed(GGUF, quick=9, most=200)
def test_gguf_sentencepiece(case, tmp_path):
    path = as_gguf(case, OF_SENTENCEPIECE, tmp_path / "m.gguf")
    encoded(path, path)


@fuzzed(BYTES, quick=18, most=300)
def test_gguf_bytes(case, right, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(case(FILE.header) + FILE.data)
    loaded(path, right[1], path)
    encoded(path, path)


@fuzzed(JSON, quick=13, most=300)
def test_config_json(case, right, copied):
    """Also `read_config` of what Python can read."""
    path = copied / "config.json"
    text = case(json.loads(path.read_text()))
    path.write_bytes(text)
    loaded(copied, right[1], copied)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        return
    if (got := attempt(lambda: read_config(config))) is not REFUSED:
        for key, size in sizes(got).items():
            said = config.get(key)
            assert said is None or (size, type(size)) == (said, type(said)), key


def sizes(config):
    """The sizes of a model under their keys in a config.json."""
    layer = config.layers[0]
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": layer.attention.num_heads,
        "num_key_value_heads": layer.attention.num_kv_heads,
        "intermediate_size": layer.mlp.intermediate_size,
    }


@fuzzed(JSON, quick=7, most=100)
def test_generation_config_json(case, right, copied):
    path = copied / "generation_config.json"
    path.write_bytes(case(json.loads(path.read_text())))
    loaded(copied, right[1], path, copied / "config.json")


@fuzzed(JSON, quick=13, most=150)
def test_index(case, right, copied):
    path = copied / "model.safetensors.index.json"
    path.write_bytes(case(json.loads(path.read_text())))
    loaded(copied, right[1], copied)


def safetensors_parts(data):
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


@fuzzed((*JSON, *BYTES), quick=11, most=300)
def test_shard(case, copied, right):
    path = sorted(copied.glob("*.safetensors"))[0]
    data = path.read_bytes()
    header, numbers = safetensors_parts(data)
    if case.mutator in JSON:
        text = case(header)
        path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)
    else:
        path.write_bytes(case(data[: -len(numbers)]) + numbers)
    loaded(copied, right[1], copied)


@fuzzed(JSON, quick=13, most=150)
def test_tokenizer_json(case, copied):
    path = copied / "tokenizer.json"
    path.write_bytes(case(json.loads(path.read_text())))
    encoded(copied, copied)


@fuzzed(JSON, quick=7, most=100)
def test_tokenizer_config_json(case, copied):
    path = copied / "tokenizer_config.json"
    path.write_bytes(case(json.loads(path.read_text())))
    encoded(copied, copied)


LINES = 'one two\n\n{"prompt": "three", "arrival": 2}\r\n  f\u00fcnf \u2028 sechs\n{"prompt": "\\u00e4"}\n'.encode()


def json_line(rng, data):
    """A line of hostile JSON between the others."""
    return data + rng.choice(JSON)(rng, {"prompt": "three", "arrival": 2}) + b"\n" + data


@fuzzed((*BYTES, json_line), quick=10, most=150)
def test_prompts(case, tmp_path):
    """Each line that is not empty is one prompt, as it stands or as its JSON says."""
    path = tmp_path / "prompts"
    path.write_bytes(case(LINES))
    if (prompts := attempt(lambda: read_prompts(path), path)) is REFUSED:
        return
    lines = dict(enumerate(path.read_bytes().decode("utf-8-sig").split("\n"), 1))
    assert [each.number for each in prompts] == [number for number, line in lines.items() if line.strip()]
    for each in prompts:
        line = lines[each.number].strip(" \t\r")
        entry = json.loads(line) if line.startswith("{") else {"prompt": line}
        assert (each.prompt, each.arrival) == (entry["prompt"], entry.get("arrival", 0))
