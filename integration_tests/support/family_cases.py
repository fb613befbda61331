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
MSCALE = {"mscale": 1.3, "mscale_all_dim": 0.7}
LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 9,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}
LOCAL_AND_GLOBAL = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 3.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 3.0, 5.0],
}
BEYOND = {"max_position_embeddings": 128, "original_max_position_embeddings": 16, "max_positions": 128}
"""A model that serves sequences longer than it was first trained for, as `TEXT` is."""
WINDOWED, FULL = "sliding_attention", "full_attention"


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
            "dynamic-beyond": {"rope_parameters": DYNAMIC, "max_position_embeddings": 16, "max_positions": len(TEXT)},
            "yarn": {"rope_parameters": YARN},
            "longrope": {"rope_parameters": LONGROPE, "head_dim": 8},
            "longrope-beyond": {"rope_parameters": LONGROPE, "head_dim": 8, **BEYOND},
        },
    ),
    FamilyCase("mistral", {"sliding_window": 6, "head_dim": 8}, {"no-window": {"sliding_window": None}}),
    FamilyCase(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        {"tied-yarn": {"rope_parameters": YARN, "use_sliding_window": False, "tie_word_embeddings": True}},
    ),
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
    FamilyCase(
        "cohere",
        {"use_qk_norm": True},
        {"untied-biases": {"use_qk_norm": False, "attention_bias": True, "tie_word_embeddings": False}},
    ),
    FamilyCase(
        "cohere2",
        {"layer_types": [WINDOWED, FULL, WINDOWED], "sliding_window": 6},
        {"untied-biases": {"attention_bias": True, "tie_word_embeddings": False, "sliding_window": 9}},
    ),
    FamilyCase("glm", {"head_dim": 12}),
    FamilyCase("glm4", {"head_dim": 12}, {"tied-no-biases": {"attention_bias": False, "tie_word_embeddings": True}}),
    FamilyCase(
        "gpt2",
        {"n_inner": 56},
        {
            "untied": {"tie_word_embeddings": False, "activation_function": "relu", "n_inner": None},
            "scales": {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
        },
    ),
    FamilyCase(
        "granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.5, "residual_multiplier": 0.7, "logits_scaling": 2.0},
        {"tied-biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}},
    ),
    FamilyCase(
        "granitemoehybrid",
        {
            "layer_types": [FULL] * 3,
            "num_local_experts": 0,
            "mamba_n_heads": 6,
            "shared_intermediate_size": 40,
            "position_embedding_type": "rope",
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.5,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
        },
        {"no-rope": {"position_embedding_type": None, "attention_bias": True, "tie_word_embeddings": True}},
    ),
    FamilyCase(
        "ministral",
        {"layer_types": [WINDOWED, FULL, WINDOWED], "sliding_window": 6, "head_dim": 10},
    ),
    FamilyCase(
        "ministral3",
        {"head_dim": 10, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.3}},
        {"tied-window": {"tie_word_embeddings": True, "sliding_window": 6}},
    ),
    FamilyCase("olmo2", {}, {"tied-biases": {"tie_word_embeddings": True, "attention_bias": True}}),
    FamilyCase(
        "olmo3",
        {
            "layer_types": [WINDOWED, FULL, WINDOWED],
            "sliding_window": 6,
            "rope_parameters": {FULL: YARN, WINDOWED: {"rope_type": "default", "rope_theta": 500.0}},
        },
        {"old-rope": {"rope_parameters": None, "rope_theta": 1000.0, "rope_scaling": YARN}},
    ),
    FamilyCase(
        "phi3",
        {"sliding_window": 6},
        {
            "tied-partial": {
                "rope_parameters": {
                    **LONGROPE,
                    "short_factor": [1.0, 1.1, 1.3],
                    "long_factor": [1.0, 2.0, 4.0],
                    "partial_rotary_factor": 0.75,
                },
                "original_max_position_embeddings": 48,
                "tie_word_embeddings": True,
                "sliding_window": None,
            },
            "beyond": {"rope_parameters": LONGROPE, **BEYOND},
        },
    ),
    FamilyCase(
        "smollm3",
        {"no_rope_layers": [1, 0, 1]},
        {
            "untied-biases-window": {
                "tie_word_embeddings": False,
                "attention_bias": True,
                "mlp_bias": True,
                "use_sliding_window": True,
                "sliding_window": 6,
            }
        },
    ),
    FamilyCase(
        "gemma4_text",
        {"head_dim": 8, "global_head_dim": 12, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 6}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2, "use_double_wide_mlp": True}
        | {"hidden_size_per_layer_input": 5, "vocab_size_per_layer_input": 101, "final_logit_softcapping": 9.0},
        {
            "experts": {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 20}
            | {"num_kv_shared_layers": 0},
            "values-are-keys": {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0}
            | {"hidden_size_per_layer_input": 0, "tie_word_embeddings": False, "attention_bias": True},
        },
        no_effect=("layers.3.layer_scalar",),  # the final norm undoes it
    ),
    FamilyCase(
        "qwen3_moe",
        {"head_dim": 10, "num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
        | {"mlp_only_layers": [1], "norm_topk_prob": True},
        {
            "sparse-window": {"decoder_sparse_step": 2, "mlp_only_layers": [], "norm_topk_prob": False}
            | {"use_sliding_window": True, "sliding_window": 6, "attention_bias": True, "tie_word_embeddings": True},
        },
    ),
    FamilyCase(
        "mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 6},
        {"llama3": {"sliding_window": None, "head_dim": 10, "rope_parameters": LLAMA3, "tie_word_embeddings": True}},
    ),
    FamilyCase(
        "gpt_oss",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 10, "sliding_window": 6, "swiglu_limit": 1.5}
        | {"initializer_range": 2.0},  # of the sinks, so that they matter beside peaked attention
        {
            "yarn": {"rope_parameters": YARN, "attention_bias": False, "swiglu_alpha": 0.9, "head_dim": 16},
            "llama3-full": {"rope_parameters": LLAMA3, "layer_types": ["full_attention"] * 3},
        },
    ),
    FamilyCase(
        "deepseek_v2",
        {**LATENT, "q_lora_rank": 20, "n_routed_experts": 8, "num_experts_per_tok": 3, "topk_method": "greedy"}
        | {"n_shared_experts": 2, "routed_scaling_factor": 1.5},
        {
            "groups-biases-yarn": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
            | {"q_lora_rank": None, "attention_bias": True, "rope_parameters": {**YARN, **MSCALE}}
            | {"rms_norm_eps": 1e-3, "mlp_bias": True, "tie_word_embeddings": True},
        },
    ),
    FamilyCase(
        "deepseek_v3",
        {**LATENT, "q_lora_rank": 20, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
        | {"n_shared_experts": 1},
        {
            "yarn-halves": {"rope_parameters": {**YARN, **MSCALE}, "rope_interleave": False, "norm_topk_prob": False},
            "kimi-k2": {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "attention_bias": True},
        },
    ),
)
