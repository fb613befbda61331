"""Small random models, saved by transformers as Hugging Face directories."""

import json

import torch
import transformers

FAMILIES = {
    "LlamaForCausalLM": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "MistralForCausalLM": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "Qwen2ForCausalLM": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}


def save_random(directory, family="LlamaForCausalLM", *, dtype=torch.float32, max_shard_size="40KB", **settings):
    """Save a random model in several shards. Returns the model that transformers reads back in float32."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **settings})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            # transformers sets biases to 0 and norms to 1; then a bias or norm that we drop would not be seen
            weight.add_(0.1 * torch.randn_like(weight)) if weight.ndim == 1 else weight.mul_(4)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return model_class.from_pretrained(directory, dtype=torch.float32, local_files_only=True)


def torch_logits(model, token_ids):
    with torch.no_grad():
        return model(torch.tensor(token_ids)[None]).logits[0].numpy()


def edit_config(directory, **settings):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
