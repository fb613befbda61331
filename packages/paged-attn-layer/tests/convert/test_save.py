import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import load_file
from tiny_checkpoints import CONFIG, config_of, gguf_writer, random_weights, weights_of, write_directory, write_gguf

from paged_attn_layer import WeightFunction, convert_checkpoint, load_model, read_config, save_model
from paged_attn_layer._src.convert import save as save_module
from paged_attn_layer._src.convert.source import ConversionError
from paged_attn_layer._src.models.registry import FAMILIES

FORMATS = ("safetensors", "orbax")


def assert_equal(found, want):
    assert found.keys() == want.keys()
    for name, weight in want.items():
        np.testing.assert_array_equal(found[name], weight)
        assert found[name].dtype == weight.dtype


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_types[0])
def test_saving_is_the_inverse_of_loading(tmp_path, family):
    config = config_of(family)
    model = family.build(read_config(config), param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    save_model(model, tmp_path / "new", config=config)
    assert_equal(weights_of(load_model(tmp_path / "new")), weights_of(model))


@pytest.mark.parametrize("to", FORMATS)
def test_a_model_on_a_mesh(tmp_path, to):
    given = random_weights()
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    model = load_model(given, config=CONFIG, mesh=mesh, dtype=jnp.bfloat16)
    save_model(model, tmp_path / "new", config=CONFIG, to=to, dtype=jnp.float32)
    want = {path: weight.astype(np.float32) for path, weight in weights_of(model).items()}
    again = load_model(tmp_path / "new", mesh=Mesh(np.array(jax.devices()[:4]), ("tp",)))
    assert_equal(weights_of(again), want)
    assert len(again.layers[0].mlp.up_proj.kernel[...].addressable_shards) == 4


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("kind", ["directory", "gguf", "mapping", "function"])
def test_every_source_can_be_converted(tmp_path, kind, to):
    given, source, config = random_weights(), tmp_path / "source", None
    if kind == "directory":
        source.mkdir()
        write_directory(source, given, shards=2)
    elif kind == "gguf":
        source = tmp_path / "source.gguf"
        write_gguf(source, given)
    else:
        config = CONFIG
        shapes = {name: weight.shape for name, weight in given.items()}
        source = given if kind == "mapping" else WeightFunction(shapes, given.__getitem__)
    report = convert_checkpoint(source, tmp_path / "new", config=config, to=to)
    assert (report.num_weights, report.num_bytes) == (len(given), sum(weight.nbytes for weight in given.values()))
    assert_equal(weights_of(load_model(tmp_path / "new")), weights_of(load_model(source, config=config)))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_from_orbax_to_safetensors(tmp_path):
    given = random_weights()
    convert_checkpoint(given, tmp_path / "orbax", config=CONFIG, to="orbax")
    convert_checkpoint(tmp_path / "orbax", tmp_path / "hf", max_file_bytes=3000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in given.values())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 3
    found = {}
    for file in files:
        part = load_file(tmp_path / "hf" / file)
        assert len(part) == 1 or sum(weight.nbytes for weight in part.values()) <= 3000
        assert all(index["weight_map"][name] == file for name in part)
        found |= part
    assert_equal(found, given)


@pytest.mark.parametrize("to", FORMATS)
def test_the_type_of_the_weights(tmp_path, to):
    given = random_weights()
    given["model.norm.weight"] = given["model.norm.weight"].astype(np.float16)
    convert_checkpoint(given, tmp_path / "kept", config={**CONFIG, "torch_dtype": "float32"}, to=to)
    convert_checkpoint(tmp_path / "kept", tmp_path / "cast", dtype=jnp.bfloat16, to=to)
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["torch_dtype"] == "float32"
    config = json.loads((tmp_path / "cast" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config
    sources = {name: save_module.open_checkpoint(tmp_path / name) for name in ("kept", "cast")}
    assert {str(sources["cast"].weight(name).dtype) for name in given} == {"bfloat16"}
    assert {name for name in given if sources["kept"].weight(name).dtype == np.float16} == {"model.norm.weight"}


def test_what_the_new_config_says(tmp_path):
    """The family by both names, and nothing of how weights were quantised."""
    write_gguf(tmp_path / "model.gguf", random_weights(tied=True))
    convert_checkpoint(tmp_path / "model.gguf", tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert config["tie_word_embeddings"]
    assert config["eos_token_id"] is None
    given = {**CONFIG, "quantization_config": None, "eos_token_id": [3], "pad_token_id": None}
    convert_checkpoint(random_weights(), tmp_path / "other", config=given)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["eos_token_id"] == [3]
    assert "quantization_config" not in config
    assert config["pad_token_id"] is None  # not what transformers' class has for a key that is left out


def test_the_language_model_of_a_larger_one(tmp_path):
    """Its weights are written, so its settings are."""
    text = {key: value for key, value in CONFIG.items() if key != "architectures"}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "text_config": text,
        "vision_config": {},
        "tie_word_embeddings": True,
    }
    convert_checkpoint(random_weights(tied=True), tmp_path / "new", config=config)
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written == {**CONFIG, "model_type": "llama", "tie_word_embeddings": True, "eos_token_id": None}


def test_files_of_the_tokenizer_come_along(tmp_path):
    (tmp_path / "old").mkdir()
    write_directory(tmp_path / "old", random_weights())
    for name in ("tokenizer.json", "generation_config.json", "notes.txt"):
        (tmp_path / "old" / name).write_text("{}")
    assert convert_checkpoint(tmp_path / "old", tmp_path / "new").notes == ()
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
    }


def test_a_source_without_a_tokenizer_is_said(tmp_path):
    write_gguf(tmp_path / "model.gguf", random_weights())
    (note,) = convert_checkpoint(tmp_path / "model.gguf", tmp_path / "a").notes
    assert note.startswith("no tokenizer: ")
    assert "model.gguf" in note
    assert convert_checkpoint(random_weights(), tmp_path / "b", config=CONFIG).notes == (
        "no tokenizer: arrays have none",
    )


def test_frequencies_that_no_config_can_say(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf_writer(path)
    writer.add_tensor("rope_freqs.weight", np.float32([1, 2]))
    write_gguf(path, random_weights(), writer)
    with pytest.raises(NotImplementedError, match=r'rope_freqs.weight.*use to="orbax"'):
        convert_checkpoint(path, tmp_path / "new")
    convert_checkpoint(path, tmp_path / "new", to="orbax")
    assert load_model(tmp_path / "new").config == load_model(path).config


def fails(*_args, **_options):
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["_write_safetensors", "_copy_tokenizer"])
def test_nothing_half_written(tmp_path, monkeypatch, step):
    monkeypatch.setattr(save_module, step, fails)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(random_weights(), tmp_path / "new", config=CONFIG)
    with pytest.raises(ConversionError):
        convert_checkpoint({"a": np.ones(2)}, tmp_path / "new", config={**CONFIG, "num_hidden_layers": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_there_is_kept(tmp_path):
    (tmp_path / "new").mkdir()
    convert_checkpoint(random_weights(), tmp_path / "new", config=CONFIG)  # an empty one is filled
    before = (tmp_path / "new" / "model.safetensors").stat().st_mtime_ns
    for path in (tmp_path / "new", tmp_path / "new" / "config.json"):
        with pytest.raises(ValueError, match="exists already; give the path of a new directory"):
            convert_checkpoint(random_weights(), path, config=CONFIG)
    assert (tmp_path / "new" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        convert_checkpoint(random_weights(), tmp_path / "nowhere" / "new", config=CONFIG)


def test_too_little_room_is_known_before(tmp_path, monkeypatch):
    usage = save_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(save_module.shutil, "disk_usage", lambda _path: usage._replace(free=10))
    with pytest.raises(OSError, match=r"has 10 bytes left, and the weights need 19,776; make room"):
        convert_checkpoint(random_weights(), tmp_path / "new", config=CONFIG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "pickle"}, "to='pickle' must be one of safetensors, orbax"),
        ({"dtype": jnp.int8}, "dtype=int8 must be a floating type"),
        ({"max_file_bytes": 0}, "max_file_bytes=0 must be at least 1"),
    ],
)
def test_arguments_that_cannot_work(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint({}, tmp_path / "new", config=CONFIG, **options)


def test_a_config_of_another_model(tmp_path):
    model = load_model(random_weights(), config=CONFIG)
    other = {**CONFIG, "vocab_size": 33, "num_hidden_layers": 1, "tie_word_embeddings": True}
    with pytest.raises(ValueError, match="config is not that of the model") as caught:
        save_model(model, tmp_path / "new", config=other)
    assert "lm_head of the model has no place" in str(caught.value)
    assert "embed.embedding of the model has shape (32, 16), and of config (33, 16)" in str(caught.value)
    with pytest.raises(ValueError, match=r"the model has no layers\.2"):
        save_model(model, tmp_path / "new", config={**CONFIG, "num_hidden_layers": 3})


def test_a_broken_orbax_checkpoint(tmp_path):
    convert_checkpoint(random_weights(), tmp_path / "new", config=CONFIG, to="orbax")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    (tmp_path / "new" / "config.json").write_text(json.dumps({**config, "intermediate_size": 25}))
    with pytest.raises(ConversionError, match=r"has shape \(24, 16\), which must be \(25, 16\)"):
        load_model(tmp_path / "new")
    (tmp_path / "new" / "config.json").write_text(json.dumps(config))
    (tmp_path / "new" / "orbax" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"new/orbax"):
        load_model(tmp_path / "new")
