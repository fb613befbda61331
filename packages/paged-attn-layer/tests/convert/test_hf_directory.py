import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoints import random_weights, write_directory

from paged_attn_layer import read_config
from paged_attn_layer._src.convert.hf_directory import HFDirectory


@pytest.mark.parametrize("shards", [1, 4])
def test_names_shapes_and_values(tmp_path, shards):
    given = random_weights()
    write_directory(tmp_path, given, shards=shards)
    source = HFDirectory(tmp_path)
    assert source.shapes == {name: weight.shape for name, weight in given.items()}
    assert source.problems == []
    for name, weight in given.items():
        np.testing.assert_array_equal(source.read(name), weight)


def test_end_tokens_of_both_configs(tmp_path):
    """Chat models name the token that ends a turn in generation_config.json alone."""
    write_directory(tmp_path, {}, eos_token_id=2)
    assert read_config(HFDirectory(tmp_path).config).end_token_ids == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert read_config(HFDirectory(tmp_path).config).end_token_ids == {2, 7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert read_config(HFDirectory(tmp_path).config).end_token_ids == {2, 9}
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_config(HFDirectory(tmp_path).config).end_token_ids == {2}


def test_end_tokens_where_the_language_model_is_nested(tmp_path):
    write_directory(tmp_path, {}, eos_token_id=[1, 5], text_config={"eos_token_id": 2})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert HFDirectory(tmp_path).config["text_config"]["eos_token_id"] == [1, 5, 2, 3]


def test_bfloat16_is_read_as_it_is(tmp_path):
    write_directory(tmp_path, {"a": np.ones((2, 3), ml_dtypes.bfloat16)})
    assert HFDirectory(tmp_path).read("a").dtype == ml_dtypes.bfloat16


def test_each_broken_shard_is_one_problem(tmp_path):
    given = random_weights()
    write_directory(tmp_path, given, shards=4)
    files = sorted(tmp_path.glob("*.safetensors"))
    files[0].unlink()
    files[1].write_bytes(b"not safetensors")
    first = next(iter(given))
    source = HFDirectory(tmp_path)
    assert [problem.split(" (")[0] for problem in source.problems] == [
        "model-00001-of-00004.safetensors is missing, though model.safetensors.index.json lists weights in it; "
        "download it again",
        "model-00002-of-00004.safetensors is corrupt",
    ]
    assert source.shapes[first] is None
    assert set(source.shapes) == set(given)


def test_a_weight_that_the_index_promises_in_vain(tmp_path):
    write_directory(tmp_path, random_weights(), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weight_map, "ghost": "model-00001-of-00002.safetensors"}}))
    (problem,) = HFDirectory(tmp_path).problems
    assert problem.startswith("ghost is not in model-00001-of-00002.safetensors")


def test_a_truncated_single_file_is_a_problem(tmp_path):
    write_directory(tmp_path, random_weights())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    (problem,) = HFDirectory(tmp_path).problems
    assert problem.startswith("model.safetensors is corrupt")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "config.json is missing"),
        ({"config.json": "{"}, "config.json is not valid JSON"),
        ({"config.json": "[]"}, "config.json must hold a JSON object"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "has neither model.safetensors nor model.safetensors.index"),
        ({"config.json": "{}", "model.safetensors.index.json": "{}"}, "has no weight_map"),
    ],
)
def test_directories_that_are_no_checkpoint(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        HFDirectory(tmp_path)


def test_unlisted_weights_are_seen_too(tmp_path):
    write_directory(tmp_path, random_weights(), shards=2)
    file = tmp_path / "model-00002-of-00002.safetensors"
    save_file({"extra": np.ones(2, np.float32), "model.norm.weight": np.ones(16, np.float32)}, file)
    assert HFDirectory(tmp_path).shapes["extra"] == (2,)
