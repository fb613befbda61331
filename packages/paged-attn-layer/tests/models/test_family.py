"""What must hold for the declarations of every family."""

import gguf
import pytest
from family_weights import Checkpoint, assert_equal, load, random_model_weights
from tiny_checkpoints import CONFIG, config_of

from paged_attn_layer._src.convert.weights import export_weights
from paged_attn_layer._src.models.registry import FAMILIES
from paged_cache import HFConfig

SETTINGS = [{}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "use_qk_norm": True}]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_types[0])
@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "tied-biases"])
def test_weights_exported_and_loaded_are_the_same(family, settings):
    config = family.read_config(HFConfig.of(config_of(family, **settings)))
    weights, rules = random_model_weights(family, config), family.weights(config)
    shapes = {path: weight.shape for path, weight in weights.items()}
    assert_equal(load(Checkpoint(dict(export_weights(weights, rules))), shapes, rules), weights)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.gguf], ids=lambda family: family.model_types[0])
@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "tied-biases"])
def test_gguf_tensors_and_back_are_the_same(family, settings):
    """Every Hugging Face weight has its place in a GGUF file, and comes back from it."""
    config = family.read_config(HFConfig.of(config_of(family, **settings)))
    checkpoint = dict(export_weights(random_model_weights(family, config), family.weights(config)))
    rules = family.gguf.tensors(CONFIG)
    shapes = {name: weight.shape for name, weight in checkpoint.items()}
    tensors = dict(export_weights(checkpoint, rules))
    assert tensors.keys() == {name_in_gguf(family.gguf.architecture, name) for name in checkpoint}
    assert_equal(load(Checkpoint(tensors), shapes, rules), checkpoint)


def name_in_gguf(architecture, name):
    """What the `gguf` package, which llama.cpp's converter uses, calls a Hugging Face weight."""
    (kind,) = (kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(kind, CONFIG["num_hidden_layers"]).get_name(name, (".weight", ".bias"))
