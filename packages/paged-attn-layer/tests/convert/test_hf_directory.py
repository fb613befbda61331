import json
import os
import re

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
        np.testing.assert_array_equal(source.weight(name), weight)


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
    assert HFDirectory(tmp_path).weight("a").dtype == ml_dtypes.bfloat16


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
        ({"config.json": "[" * 10**5}, "config.json is not valid JSON"),
        ({"config.json": '{"a": 1' + "0" * 5000 + "}"}, "config.json is not valid JSON"),
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


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "a\\b.safetensors",
        "C:b",
        "..",
        ".",
        "a\0b",
        "x" * 256,
        "\ud800" * 100,
        "",
        None,
        3,
        ["a"],
    ],
)
def test_an_index_may_name_only_files_beside_it(tmp_path, file):
    directory = tmp_path / "model"
    directory.mkdir()
    write_directory(directory, random_weights())
    (directory / "model.safetensors").rename(tmp_path / "outside.safetensors")
    weight_map = dict.fromkeys(random_weights(), file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = rf"index.json says that model.embed_tokens.weight is in {re.escape(repr(file))}, which must be the name"
    with pytest.raises(ValueError, match=message):
        HFDirectory(directory)


def test_files_may_be_links(tmp_path):
    """The cache of a hub is made of them."""
    directory = tmp_path / "snapshot"
    directory.mkdir()
    given = random_weights()
    write_directory(tmp_path, given)
    for name in ("config.json", "model.safetensors"):
        (directory / name).symlink_to(tmp_path / name)
    assert HFDirectory(directory).shapes == {name: weight.shape for name, weight in given.items()}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    write_directory(tmp_path, random_weights(), shards=2)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is not a regular file"):
        HFDirectory(tmp_path)


def test_a_pipe_in_place_of_weights(tmp_path):
    write_directory(tmp_path, random_weights())
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    assert HFDirectory(tmp_path).problems == ["model.safetensors is not a regular file; download it again"]


def test_an_index_that_names_another_shard(tmp_path):
    """The weight is read from the shard that has it, as transformers does."""
    given = random_weights()
    write_directory(tmp_path, given, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map["model.norm.weight"] = weight_map["model.embed_tokens.weight"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    source = HFDirectory(tmp_path)
    assert source.problems == []
    np.testing.assert_array_equal(source.weight("model.norm.weight"), given["model.norm.weight"])


def test_of_two_shards_with_one_weight_the_index_chooses(tmp_path):
    write_directory(tmp_path, random_weights(), shards=3)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    for number, file in enumerate(files):
        save_file({"a": np.full(number + 1, number, np.float32)}, tmp_path / file)
    weight_map = {"a": files[1], "b": files[0], "c": files[2]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = HFDirectory(tmp_path)
    assert source.shapes["a"] == (2,)
    np.testing.assert_array_equal(source.weight("a"), [1, 1])


@pytest.mark.parametrize(("dtype", "kind"), [("int8", "I8"), ("complex64", "C64"), ("bool", "BOOL")])
def test_types_that_are_no_weights(tmp_path, dtype, kind):
    write_directory(tmp_path, {**random_weights(), "model.norm.weight": np.ones(16, dtype)}, tie_word_embeddings=True)
    assert HFDirectory(tmp_path).problems == [
        f"1 weights in model.safetensors are stored as {kind}, such as model.norm.weight; "
        "they must be F64, F32, F16, BF16, so save the model in one of these"
    ]


def test_float8_weights(tmp_path):
    """Their values mean nothing without scales. safetensors cannot read them into numpy, nor write them from it."""
    write_directory(tmp_path, {"model.norm.weight": np.ones(16, np.int8)})
    path = tmp_path / "model.safetensors"
    content = path.read_bytes().replace(b'"I8"', b'"F8_E4M3"')
    header = content[8 : content.index(b"}}") + 2]
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    (problem,) = HFDirectory(tmp_path).problems
    assert problem.startswith("1 weights in model.safetensors are stored as F8_E4M3, such as model.norm.weight;")


def test_a_file_that_breaks_after_its_header_was_read(tmp_path):
    write_directory(tmp_path, random_weights())
    source = HFDirectory(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors: mmap length is greater than file size"):
        source.weight("model.norm.weight").read()


def test_unlisted_weights_are_seen_too(tmp_path):
    write_directory(tmp_path, random_weights(), shards=2)
    file = tmp_path / "model-00002-of-00002.safetensors"
    save_file({"extra": np.ones(2, np.float32), "model.norm.weight": np.ones(16, np.float32)}, file)
    assert HFDirectory(tmp_path).shapes["extra"] == (2,)


@pytest.mark.parametrize("ends", ["3", [3, True], {"a": 1}, [2.0]])
def test_end_tokens_of_generation_config_that_are_no_ids(tmp_path, ends):
    """The error names the file that they are in."""
    write_directory(tmp_path, random_weights(), eos_token_id=1)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id=.* must be a token id"):
        HFDirectory(tmp_path)
