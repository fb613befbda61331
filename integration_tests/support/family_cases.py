"""The families that are compared with transformers: one entry each, which `test_families.py` runs all its tests on.

To add a family, add an entry: its model type, settings that make a small model whose every part matters, and variants
for what its other checkpoints have. Sizes are odd on purpose. Windows are shorter than `TEXT`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

TEXT = np.random.default_rng(7).integers(0, 101, 37).tolist()
"""The tokens that are compared."""
SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}
LOCAL_AND_GLOBAL = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 3.0}


@dataclasses.dataclass(frozen=True)
class FamilyCase:
    """A family's small models."""

    model_type: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Added to `SIZES`, for the model that all tests run on."""
    variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """More settings by name, each for one more model whose logits are compared."""
    no_effect: tuple[str, ...] = ()
    """Ends of names of weights that change no logits in transformers' model either."""

    def config(self, variant: str | None = None) -> dict[str, Any]:
        """The keys of a config.json, of the base model or of a variant."""
        return {"model_type": self.model_type, **SIZES, **self.settings, **(self.variants[variant] if variant else {})}


CASES = (
    FamilyCase(
        "llama",
        {"head_dim": 10},
        {
            "tied-biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
            "llama3": {"rope_parameters": LLAMA3},
            "linear": {"rope_parameters": LINEAR},
            "dynamic": {"rope_parameters": DYNAMIC},
            "yarn": {"rope_parameters": YARN},
        },
    ),
    FamilyCase("mistral", {"sliding_window": 6, "head_dim": 8}),
    FamilyCase("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    FamilyCase(
        "qwen3",
        {"head_dim": 12, "tie_word_embeddings": True},
        {
            "window-bias": {
                "use_sliding_window": True,
                "sliding_window": 6,
                "max_window_layers": 2,
                "attention_bias": True,
            }
        },
    ),
    FamilyCase(
        "gemma2",
        {"head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 4.0},
        {"no-caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False}},
    ),
    FamilyCase(
        "gemma3_text",
        {"head_dim": 12, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"num_hidden_layers": 4, "query_pre_attn_scalar": 7, "rope_parameters": LOCAL_AND_GLOBAL},
        {
            "untied-cap": {"tie_word_embeddings": False, "final_logit_softcapping": 3.0, "attention_bias": True},
            "old-keys": {"rope_parameters": None, "rope_theta": 500.0, "rope_local_base_freq": 30.0}
            | {
                "rope_scaling": {"rope_type": "linear", "factor": 3.0},
                "layer_types": None,
                "sliding_window_pattern": 3,
            },
        },
    ),
)
