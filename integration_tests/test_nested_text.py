"""The text part of a model that sees pictures is loaded from its directory, and gives transformers' logits."""

import json

import pytest
import torch
import transformers
from family_cases import YARN
from paged_runner import PagedRunner
from parity import PAGE_SIZE, assert_close
from safetensors import safe_open

from paged_attn_layer import convert_checkpoint, load_model

TEXT = [5, 17, 2, 90, 33, 61, 8, 8, 45, 70, 12, 3, 50]
SIZES = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 6}
SIZES |= {"layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0, "eos_token_id": 1}
PICTURES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PICTURES |= {"image_size": 28, "patch_size": 14}


def gemma3():
    ids = {"image_token_index": 100, "boi_token_index": 99, "eoi_token_index": 98}
    settings = {"text_config": SIZES, "vision_config": {**PICTURES, "model_type": "siglip_vision_model"}}
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(**settings, **ids, mm_tokens_per_image=4)
    )


def gemma4():
    text = {**SIZES, "global_head_dim": 12, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 101}
    ids = {"image_token_id": 100, "video_token_id": 99, "audio_token_id": 98, "boi_token_id": 97}
    ids |= {"eoi_token_id": 96, "boa_token_id": 95, "eoa_token_index": 94}
    return transformers.Gemma4ForConditionalGeneration(transformers.Gemma4Config(text_config=text, **ids))


def mistral3(**text):
    """Mistral Small 3, or Ministral 3. Whether the head is tied is a setting of the whole."""
    pictures = {**PICTURES, "model_type": "pixtral", "head_dim": 8}
    text = {key: value for key, value in {**SIZES, **text}.items() if key != "layer_types"}
    config = transformers.Mistral3Config(text_config=text, vision_config=pictures, tie_word_embeddings=False)
    return transformers.Mistral3ForConditionalGeneration(config)


def mistral_small_3():
    return mistral3(model_type="mistral", sliding_window=None)


def ministral_3():
    return mistral3(model_type="ministral3", rope_parameters={**YARN, "llama_4_scaling_beta": 0.3})


@pytest.mark.parametrize("make", [gemma3, gemma4, mistral_small_3, ministral_3])
def test_its_logits_are_transformers(tmp_path, make):
    torch.manual_seed(0)
    hf = make().eval()
    with torch.no_grad():
        for weight in hf.parameters():
            weight.mul_(8) if weight.ndim > 1 else weight.add_(0.3 * torch.randn_like(weight))
        expected = hf(torch.tensor([TEXT])).logits[0].numpy()
    hf.save_pretrained(tmp_path / "whole")
    assert "text_config" in json.loads((tmp_path / "whole" / "config.json").read_text())
    convert_checkpoint(tmp_path / "whole", tmp_path / "text")
    with safe_open(tmp_path / "text" / "model.safetensors", "numpy") as saved:
        assert not any("vision" in name or "language_model" in name for name in saved.keys())  # noqa: SIM118
    for directory in ("whole", "text"):
        model = load_model(tmp_path / directory)
        runner = PagedRunner(model, tokens=(16,), max_seqs=1, page_size=PAGE_SIZE, pages_per_seq=4)
        assert_close(runner.feed(TEXT, [10, 3]), expected)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", local_files_only=True)
    written = json.loads((tmp_path / "text" / "config.json").read_text())
    assert written["architectures"] == [type(again).__name__]
    with torch.no_grad():
        torch.testing.assert_close(again(torch.tensor([TEXT])).logits[0], torch.from_numpy(expected))
