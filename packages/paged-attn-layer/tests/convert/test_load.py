import contextlib
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eformer.escale import PartitionAxis, PartitionManager
from flax import nnx
from jax.sharding import AxisType, Mesh
from tiny_checkpoints import CONFIG, gguf_writer, random_weights, weights_of, write_directory, write_gguf

from paged_attn_layer import read_config
from paged_attn_layer._src.convert import hf_weights
from paged_attn_layer._src.convert import load as load_module
from paged_attn_layer._src.convert import place as place_module
from paged_attn_layer._src.convert.gguf_file import GGUFFile
from paged_attn_layer._src.convert.hf_directory import HFDirectory
from paged_attn_layer._src.convert.lazy import LazyArray
from paged_attn_layer._src.convert.load import load_model, open_checkpoint
from paged_attn_layer._src.convert.operations import Split, Transpose
from paged_attn_layer._src.convert.source import ConversionError
from paged_attn_layer._src.convert.weights import WeightRule, export_weights
from paged_attn_layer._src.models import llama, mistral, qwen2


@pytest.mark.parametrize("tied", [False, True])
def test_a_directory_and_a_gguf_file_give_the_same_model(tmp_path, tied):
    given = random_weights(tied=tied)
    write_directory(tmp_path, given, shards=3, tie_word_embeddings=tied)
    write_gguf(tmp_path / "model.gguf", given)
    first, second = load_model(tmp_path), load_model(tmp_path / "model.gguf")
    assert first.config.tie_word_embeddings == second.config.tie_word_embeddings == tied
    converted = weights_of(first)
    for path, weight in weights_of(second).items():
        np.testing.assert_array_equal(weight, converted.pop(path))
    assert not converted
    k_proj = first.layers[1].attention.k_proj.kernel[...]
    np.testing.assert_array_equal(k_proj, given["model.layers.1.self_attn.k_proj.weight"].T)


@pytest.mark.parametrize("differs", [False, True])
def test_a_tied_config_beside_a_head_of_its_own(tmp_path, differs):
    """The file's head counts if it is not the embedding, as in transformers."""
    given = random_weights()
    if not differs:
        given["lm_head.weight"] = given["model.embed_tokens.weight"]
    write_directory(tmp_path, given, shards=3, tie_word_embeddings=True)
    model = load_model(tmp_path)
    assert model.config.tie_word_embeddings is not differs
    if differs:
        np.testing.assert_array_equal(model.lm_head[...], given["lm_head.weight"])


def test_a_difference_in_the_last_row(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_weights, "_ROWS", 5)
    given = random_weights()
    given["lm_head.weight"] = given["model.embed_tokens.weight"].copy()
    given["lm_head.weight"][-1, -1] += 1
    write_directory(tmp_path, given, tie_word_embeddings=True)
    assert not load_model(tmp_path).config.tie_word_embeddings


def test_a_tied_head_alone_is_the_embedding(tmp_path):
    given = random_weights()
    del given["model.embed_tokens.weight"]
    write_directory(tmp_path, given, tie_word_embeddings=True)
    np.testing.assert_array_equal(load_model(tmp_path).embed.embedding[...], given["lm_head.weight"])


def test_weights_without_prefix(tmp_path):
    """As transformers saves a model without its head, tied or beside one."""
    given = random_weights()
    write_directory(tmp_path, {name.removeprefix("model."): weight for name, weight in given.items()}, shards=3)
    exported = dict(export_weights(weights_of(load_model(tmp_path)), llama.weights(load_model(tmp_path).config)))
    assert exported.keys() == given.keys()
    for name, weight in given.items():
        np.testing.assert_array_equal(exported[name], weight)


@pytest.mark.parametrize(
    ("language_model", "head"),
    [("language_model.model.", "language_model.lm_head."), ("model.language_model.", "lm_head.")],
    ids=["old", "new"],
)
def test_the_language_model_of_a_larger_one(tmp_path, language_model, head):
    """Its weights have a prefix. Those for pictures are left out."""
    given = random_weights()
    nested = {
        name.replace("lm_head.", head) if "lm_head" in name else language_model + name.removeprefix("model."): weight
        for name, weight in given.items()
    }
    pictures = {"vision_tower.layers.0.weight": np.ones(2), "model.multi_modal_projector.weight": np.ones(2)}
    write_directory(tmp_path, nested | pictures, architectures=None, text_config=CONFIG)
    exported = dict(export_weights(weights_of(load_model(tmp_path)), llama.weights(load_model(tmp_path).config)))
    assert exported.keys() == given.keys()
    for name, weight in given.items():
        np.testing.assert_array_equal(exported[name], weight)


def test_a_head_beside_a_config_that_ties_by_its_model_type(tmp_path):
    """Gemma's files leave out `tie_word_embeddings`."""
    given = random_weights()
    write_directory(tmp_path, given, architectures=["Gemma3ForCausalLM"])
    assert not read_config(open_checkpoint(tmp_path).config).tie_word_embeddings
    given["lm_head.weight"] = given["model.embed_tokens.weight"]
    write_directory(tmp_path, given, architectures=["Gemma3ForCausalLM"])
    assert read_config(open_checkpoint(tmp_path).config).tie_word_embeddings


@pytest.mark.parametrize(
    "family", [llama.FAMILY, mistral.FAMILY, qwen2.FAMILY], ids=lambda family: family.model_types[0]
)
@pytest.mark.parametrize("named_by", ["architectures", "model_type"])
def test_families_of_llamas_form(tmp_path, family, named_by):
    """Its model is found, filled, and its weights are the checkpoint's again when they are exported."""
    given = random_weights(qkv_bias="qwen2" in family.model_types)
    name = {"architectures": list(family.architectures)} if named_by == "architectures" else {"architectures": None}
    write_directory(tmp_path, given, shards=2, model_type=family.model_types[0], **name)
    model = load_model(tmp_path)
    exported = dict(export_weights(weights_of(model), family.weights(model.config)))
    assert exported.keys() == given.keys()
    for weight_name, weight in given.items():
        np.testing.assert_array_equal(exported[weight_name], weight)


def test_fused_weights_are_read_once(tmp_path, monkeypatch):
    """A family whose checkpoints have Q, K and V in one weight: read once, split on the way."""
    given = random_weights()
    apart = [[given.pop(f"model.layers.{n}.self_attn.{part}_proj.weight") for part in "qkv"] for n in range(2)]
    fused = {f"model.layers.{n}.self_attn.qkv.weight": np.concatenate(parts) for n, parts in enumerate(apart)}
    rule = WeightRule(
        ("model.layers.{layer}.self_attn.qkv.weight",),
        tuple(f"layers.{{layer}}.attention.{part}_proj.kernel" for part in "qkv"),
        (Split(0, (16, 8, 8)), Transpose()),
    )
    family = dataclasses.replace(llama.FAMILY, weights=lambda config: (rule, *llama.weights(config)))
    monkeypatch.setattr(load_module, "find_family", lambda config: family)
    write_directory(tmp_path, {**given, **fused})
    read, names = HFDirectory.weight, []
    monkeypatch.setattr(HFDirectory, "weight", lambda self, name: names.append(name) or read(self, name))
    model = load_model(tmp_path)
    assert sorted(names) == sorted({**given, **fused})
    np.testing.assert_array_equal(model.layers[1].attention.k_proj.kernel[...], apart[1][1].T)


def test_work_before_reading_grows_with_the_layers_and_not_with_their_square(tmp_path):
    def calls(layers):
        names = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(layers)]
        write_directory(tmp_path, dict.fromkeys(names, np.ones(16, np.float32)), num_hidden_layers=layers)
        count = 0

        def profile(_frame, event, _arg):
            nonlocal count
            count += event == "call"

        sys.setprofile(profile)
        with contextlib.suppress(ConversionError):  # most weights are missing
            load_model(tmp_path)
        sys.setprofile(None)
        return count

    calls(1)  # what only the first call has to do
    few, many = calls(10), calls(20)
    assert many < 2.2 * few


@pytest.mark.parametrize("layers", [3, 10**9])
def test_more_layers_than_the_checkpoint_has(tmp_path, layers):
    """Refused before the model is built, which would never end."""
    write_directory(tmp_path, random_weights(), num_hidden_layers=layers)
    message = rf"num_hidden_layers .* is {layers}, and there are weights of 2 layers"
    with pytest.raises(ConversionError, match=message):
        load_model(tmp_path)
    write_gguf(tmp_path / "model.gguf", random_weights(), gguf_writer(tmp_path / "model.gguf", block_count=layers))
    with pytest.raises(ConversionError, match=message):
        load_model(tmp_path / "model.gguf")


def test_broken_files_are_said_before_the_layers_that_they_lack(tmp_path):
    write_directory(tmp_path, random_weights())
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConversionError, match=r"model\.safetensors is corrupt") as error:
        load_model(tmp_path)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"rms_norm_eps": "small"}, ValueError),
        ({"hidden_act": ["silu"]}, (ValueError, NotImplementedError)),
        ({"architectures": ["BertModel"]}, NotImplementedError),
        ({"rope_scaling": {"type": "su"}}, NotImplementedError),
    ],
)
def test_errors_of_settings_name_the_file(tmp_path, settings, kind):
    write_directory(tmp_path, random_weights(), **settings)
    with pytest.raises(kind, match=r"config\.json: "):
        load_model(tmp_path)


def test_errors_of_a_gguf_files_settings_name_the_file(tmp_path):
    writer = gguf_writer(tmp_path / "model.gguf", **{"attention.head_count": 3})
    write_gguf(tmp_path / "model.gguf", random_weights(), writer)
    with pytest.raises((ValueError, NotImplementedError), match=r"model\.gguf: "):
        load_model(tmp_path / "model.gguf")


def test_cast_on_the_way(tmp_path):
    write_directory(tmp_path, random_weights())
    assert {w.dtype.name for w in weights_of(load_model(tmp_path, dtype=jnp.bfloat16)).values()} == {"bfloat16"}


def test_the_longest_sequence_decides_frequencies_that_depend_on_it(tmp_path):
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 16}
    factors = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
    write_directory(tmp_path, random_weights(), rope_scaling={**rope, **factors})
    short, long = load_model(tmp_path), load_model(tmp_path, max_positions=48)
    assert (short.max_positions, long.max_positions) == (16, 48)
    assert [m.config.layers[0].attention.rope.freq_factors for m in (short, long)] == [(1.0, 2.0), (3.0, 4.0)]
    with pytest.raises(ValueError, match="max_positions=65 must be at most max_position_embeddings=64"):
        load_model(tmp_path, max_positions=65)


def test_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Each weight is on its device before the next is read."""
    write_directory(tmp_path, random_weights())
    log = []
    read, put = LazyArray.read, jax.device_put
    monkeypatch.setattr(LazyArray, "read", lambda *args, **options: log.append("read") or read(*args, **options))
    monkeypatch.setattr(place_module.jax, "device_put", lambda *args: log.append("put") or put(*args))
    load_model(tmp_path)
    assert log == ["read", "put"] * len(random_weights())


@pytest.mark.parametrize(
    ("axis", "manager"),
    [
        ("tp", None),
        ("tp", PartitionManager(PartitionAxis())),
        ("model", PartitionManager(PartitionAxis(head_axis="model"))),
    ],
)
def test_split_over_a_mesh_on_the_way(tmp_path, axis, manager):
    write_directory(tmp_path, random_weights())
    model = load_model(tmp_path, mesh=Mesh(np.array(jax.devices()[:2]), (axis,)), partition_manager=manager)
    hash(nnx.graphdef(model.layers[0]))  # jax.jit takes it as a static argument
    kernel = model.layers[0].mlp.down_proj.kernel[...]
    assert [shard.data.shape for shard in kernel.addressable_shards] == [(12, 16), (12, 16)]


def test_which_reader(tmp_path):
    write_directory(tmp_path, random_weights())
    write_gguf(tmp_path / "model.gguf", random_weights())
    assert isinstance(open_checkpoint(str(tmp_path)), HFDirectory)
    assert isinstance(open_checkpoint(tmp_path / "model.gguf"), GGUFFile)
    with pytest.raises(ValueError, match=r"nowhere does not exist; give a Hugging Face model directory or a .gguf"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"neither a directory nor a .gguf file"):
        open_checkpoint(tmp_path / "config.json")


def test_arguments_that_cannot_work(tmp_path):
    with pytest.raises(ValueError, match="dtype='flaot32' must be the name of a type"):
        load_model(tmp_path, dtype="flaot32")
    for dtype in (jnp.int8, jnp.float8_e4m3fn, jnp.float4_e2m1fn):
        with pytest.raises(
            ValueError, match=f"dtype={jnp.dtype(dtype).name} must be a floating type of 16 bits or more"
        ):
            load_model(tmp_path, dtype=dtype)
    mesh = jax.make_mesh((1,), ("tp",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match="must be Auto"):
        load_model(tmp_path, mesh=mesh)
