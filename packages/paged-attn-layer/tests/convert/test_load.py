import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eformer.escale import PartitionAxis, PartitionManager
from flax import nnx
from jax.sharding import AxisType, Mesh
from tiny_checkpoints import random_weights, write_directory, write_gguf

from paged_attn_layer._src.convert import load as load_module
from paged_attn_layer._src.convert import load_model, open_checkpoint
from paged_attn_layer._src.convert.gguf_file import GGUFFile
from paged_attn_layer._src.convert.hf_directory import HFDirectory


def weights_of(model):
    return {".".join(map(str, keys)): np.asarray(w[...]) for keys, w in nnx.to_flat_state(nnx.state(model))}


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


def test_cast_on_the_way(tmp_path):
    write_directory(tmp_path, random_weights())
    assert {w.dtype.name for w in weights_of(load_model(tmp_path, dtype=jnp.bfloat16)).values()} == {"bfloat16"}


def test_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Each weight is on its device before the next is read."""
    write_directory(tmp_path, random_weights())
    log = []
    read, put = HFDirectory.read, jax.device_put
    monkeypatch.setattr(HFDirectory, "read", lambda self, name: log.append("read") or read(self, name))
    monkeypatch.setattr(load_module.jax, "device_put", lambda *args: log.append("put") or put(*args))
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
    with pytest.raises(ValueError, match="dtype=int8 must be a floating type"):
        load_model(tmp_path, dtype=jnp.int8)
    mesh = jax.make_mesh((1,), ("tp",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match="must be Auto"):
        load_model(tmp_path, mesh=mesh)
