import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_checkpoints import CONFIG, random_weights, weights_of, write_directory

from paged_attn_layer import WeightFunction, load_model
from paged_attn_layer._src.convert.memory_source import memory_weights, on_host
from paged_attn_layer._src.convert.source import ConversionError


class TorchLike:
    """A tensor as torch has it: numpy knows no bfloat16, and gradients must be let go of."""

    class _Dtype:
        def __init__(self, name):
            self.name = name

        def __str__(self):
            return f"torch.{self.name}"

    def __init__(self, array, *, grad=True):
        self._array, self._grad = array, grad
        self.shape, self.dtype = array.shape, self._Dtype(array.dtype.name)

    def detach(self):
        return TorchLike(self._array, grad=False)

    def cpu(self):
        return self

    def new_empty(self, size):
        return TorchLike(np.empty(size, self._array.dtype), grad=False)

    def short(self):
        return TorchLike(self._array.astype(np.int16), grad=False)

    def view(self, dtype):
        return TorchLike(self._array.view(dtype.name), grad=False)

    def numpy(self):
        assert not self._grad
        assert self._array.dtype != ml_dtypes.bfloat16
        return self._array


@pytest.fixture(scope="module")
def from_files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_directory(directory, random_weights())
    return weights_of(load_model(directory))


def assert_equal(model, want):
    found = weights_of(model)
    assert found.keys() == want.keys()
    for path, weight in want.items():
        np.testing.assert_array_equal(found[path], weight)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, TorchLike], ids=["numpy", "jax", "torch"])
def test_arrays_by_name(from_files, kind):
    arrays = {name: kind(weight) for name, weight in random_weights().items()}
    assert_equal(load_model(arrays, config=CONFIG), from_files)


def test_a_function(from_files):
    """Asked once for each weight."""
    given, asked = random_weights(), []
    shapes = {name: weight.shape for name, weight in given.items()}
    weights = WeightFunction(shapes, lambda name: asked.append(name) or given[name])
    assert_equal(load_model(weights, config=CONFIG), from_files)
    assert sorted(asked) == sorted(given)


def test_bfloat16_of_torch_is_taken_by_its_bits():
    given = np.float32([[1.5, -3], [0.1, 7e9]]).astype(ml_dtypes.bfloat16)
    read = on_host(TorchLike(given))
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read, given)


def test_a_tied_model_whose_arrays_have_a_head_of_its_own():
    """As in a directory: the head counts if it is not the embedding."""
    given, tied = random_weights(), {**CONFIG, "tie_word_embeddings": True}
    np.testing.assert_array_equal(load_model(given, config=tied).lm_head[...], given["lm_head.weight"])
    given["lm_head.weight"] = given["model.embed_tokens.weight"]
    assert load_model(given, config=tied).config.tie_word_embeddings


def test_problems_are_those_of_a_checkpoint():
    given = random_weights()
    del given["model.norm.weight"]
    given |= {"lm_head.weight": np.ones((32, 16), int), "model.embed_tokens.weight": "text"}
    with pytest.raises(ConversionError) as caught:
        load_model(given, config=CONFIG)
    assert [line.split(";")[0] for line in caught.value.problems] == [
        "model.embed_tokens.weight is a str of type None",
        "lm_head.weight is a ndarray of type int64",
        "model.norm.weight (16,) is missing: the model's norm.scale cannot be made",
    ]


def test_a_function_that_gives_another_shape():
    weights = WeightFunction({"a": (2, 3)}, lambda _name: np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"read\('a'\) has shape \(3, 2\); it must be \(2, 3\), as `shapes` says"):
        memory_weights(weights, {}).weight("a").read()


def test_where_the_config_comes_from(tmp_path):
    with pytest.raises(ValueError, match=r"config=None must be the content of the model's config.json"):
        load_model({})
    write_directory(tmp_path, random_weights())
    with pytest.raises(ValueError, match=r"config must be left out, for .* has its own"):
        load_model(tmp_path, config=CONFIG)
    with pytest.raises(NotImplementedError, match=r"config: architecture 'Other' is not supported"):
        load_model(random_weights(), config={**CONFIG, "architectures": ["Other"]})


def test_names_that_are_no_texts():
    with pytest.raises(ValueError, match="the name 3 of a weight must be a text"):
        load_model({3: np.zeros(2, np.float32)}, config=CONFIG)
