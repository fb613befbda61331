"""A Hugging Face directory, read without torch, gives torch's logits. A broken directory gives one clear error."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import edit_config, save_random, torch_logits
from paged_runner import PagedRunner
from safetensors.numpy import load_file, save_file

from paged_attn_layer import ConversionError, load_model

TOKENS = np.random.default_rng(0).integers(0, 320, 45).tolist()
CHUNKS = [20, 1, 1, 23]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param("LlamaForCausalLM", {}, id="llama-untied"),
        pytest.param("LlamaForCausalLM", {"tie_word_embeddings": True, "head_dim": 16}, id="llama-tied"),
        pytest.param("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}, id="llama-biases"),
        pytest.param("LlamaForCausalLM", {"rope_parameters": LLAMA3}, id="llama3-rope"),
        pytest.param("MistralForCausalLM", {"sliding_window": 10}, id="mistral-window"),
        pytest.param(
            "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1}, id="qwen2"
        ),
    ],
)
def test_logits_are_torchs(tmp_path, family, settings):
    expected = torch_logits(save_random(tmp_path, family, **settings), TOKENS)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    actual = PagedRunner(load_model(tmp_path), tokens=(24,), max_seqs=2).feed(TOKENS, CHUNKS)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_bfloat16_checkpoint(tmp_path, tied):
    expected = torch_logits(save_random(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=tied), TOKENS)
    model = load_model(tmp_path)  # bfloat16 weights are float32 ones exactly
    actual = PagedRunner(model, tokens=(24,), max_seqs=2).feed(TOKENS, CHUNKS)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
    assert load_model(tmp_path, dtype=jnp.bfloat16).embed.embedding[...].dtype == jnp.bfloat16


def test_one_error_lists_every_broken_shard_and_weight(tmp_path):
    save_random(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    missing, corrupt = index["model.layers.0.mlp.up_proj.weight"], index["model.layers.1.mlp.up_proj.weight"]
    edited = index["model.layers.2.mlp.up_proj.weight"]
    assert len({missing, corrupt, edited}) == 3
    (tmp_path / missing).unlink()
    (tmp_path / corrupt).write_bytes((tmp_path / corrupt).read_bytes()[:-100])
    weights = load_file(tmp_path / edited)
    weights["model.layers.2.mlp.up_proj.weight"] = weights["model.layers.2.mlp.up_proj.weight"][:-1].copy()
    weights["model.layers.2.self_attn.q_norm.weight"] = np.ones(8, np.float32)
    save_file(weights, tmp_path / edited)
    with pytest.raises(ConversionError) as caught:
        load_model(tmp_path)
    text = str(caught.value)
    assert len(caught.value.problems) == 4, text
    assert f"{missing} is missing" in text
    assert f"{corrupt} is corrupt" in text
    assert "model.layers.2.self_attn.q_norm.weight (8,) has no place in the model" in text
    assert "model.layers.2.mlp.up_proj.weight has shape (95, 64), which must be (96, 64)" in text


def test_one_error_lists_weights_that_are_missing_or_have_no_place(tmp_path):
    save_random(tmp_path)
    edit_config(tmp_path, attention_bias=True, num_hidden_layers=2)
    with pytest.raises(ConversionError) as caught:
        load_model(tmp_path)
    assert "model.layers.1.self_attn.q_proj.bias (64,) is missing" in str(caught.value)
    assert "model.layers.2.mlp.up_proj.weight (96, 64) has no place in the model" in str(caught.value)


def test_torch_is_not_needed(tmp_path, gguf_path):
    """Model and tokenizer load when torch cannot be imported."""
    save_random(tmp_path)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import paged_attn_layer as p\n"
        f"p.load_model({str(tmp_path)!r}); tokenizer = p.load_tokenizer({str(gguf_path)!r})\n"
        "message = [{'role': 'user', 'content': 'Hi'}]\n"
        "assert tokenizer.apply_chat_template(message, add_generation_prompt=True)['input_ids'][0] == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
