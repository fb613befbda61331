"""The text part of a model that sees pictures gives transformers' logits for text."""

import pytest
import torch
import transformers
from checkpoints import torch_logits
from family_cases import SIZES, TEXT, YARN
from paged_runner import PagedRunner
from parity import assert_close, make_peaked

from paged_attn_layer import load_model

PIXTRAL = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
PIXTRAL |= {"num_attention_heads": 2, "head_dim": 8, "image_size": 16, "patch_size": 8}
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SIGLIP |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
GROWTH = {**YARN, "llama_4_scaling_beta": 0.3}


@pytest.mark.parametrize(
    ("model_type", "vision", "text", "settings"),
    [
        pytest.param("mistral3", PIXTRAL, {"model_type": "mistral", "sliding_window": None}, {}, id="mistral-small-3"),
        pytest.param(
            *("mistral3", PIXTRAL, {"model_type": "ministral3", "rope_parameters": GROWTH}),
            {"tie_word_embeddings": False},
            id="ministral-3",
        ),
        pytest.param("gemma3", SIGLIP, {"model_type": "gemma3_text"}, {"mm_tokens_per_image": 4}, id="gemma-3"),
    ],
)
def test_logits_of_text(tmp_path, model_type, vision, text, settings):
    torch.manual_seed(0)
    sizes = {**SIZES, "head_dim": 8, **text}
    config = transformers.AutoConfig.for_model(model_type, text_config=sizes, vision_config=vision, **settings)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for weight in model.state_dict().values():
            make_peaked(weight)
    model.save_pretrained(tmp_path)
    runner = PagedRunner(load_model(tmp_path), tokens=(40,), max_seqs=1, pages_per_seq=4)
    assert_close(runner.feed(TEXT, [30, 7]), torch_logits(model, TEXT))
