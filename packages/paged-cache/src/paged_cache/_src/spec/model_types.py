"""What is known of Hugging Face's model types. A new one adds its lines here."""

from collections.abc import Mapping
from typing import Any

_GEMMA = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}

ASSUMED: Mapping[str, Mapping[str, Any]] = {
    "cohere": {
        "num_key_value_heads": None,  # as many as query heads
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "tie_word_embeddings": True,
    },
    "cohere2": {
        "num_key_value_heads": None,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "tie_word_embeddings": True,
    },
    "gemma2": {
        **_GEMMA,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": {**_GEMMA, "vocab_size": 262208, "sliding_window": 4096, "sliding_window_pattern": 6},
    "gemma4_text": {
        **_GEMMA,
        "vocab_size": 262144,
        "num_hidden_layers": 30,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "global_head_dim": 512,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
            },
        },
    },
    "glm": {
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1.5625e-7,
        "attention_bias": True,
    },
    "glm4": {
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1.5625e-7,
        "attention_bias": True,
    },
    "gpt2": {
        "num_key_value_heads": None,
        "max_position_embeddings": 1024,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "sliding_window": 128,
        "sliding_window_pattern": 2,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "rope_theta": 150000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    "granite": {"num_key_value_heads": None},
    "granitemoehybrid": {
        "num_key_value_heads": None,
        "num_local_experts": 8,
        "shared_intermediate_size": 1024,
        "mamba_d_state": 256,
    },
    "llama": {"num_key_value_heads": None},
    "llama4_text": {"no_rope_layer_interval": 4},
    "ministral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "ministral3": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "mixtral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "olmo2": {"num_key_value_heads": None, "rms_norm_eps": 1e-5},
    "olmo3": {
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    "phi3": {
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "qwen2": {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
    },
    "smollm3": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2000000.0,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
}
"""What transformers 5 takes for a key that the file of a model type leaves out (`configuration_*.py` of that type)."""

KEY_NAMES: Mapping[str, Mapping[str, str]] = {
    "deepseek_v2": {"n_routed_experts": "num_local_experts"},
    "deepseek_v3": {"n_routed_experts": "num_local_experts"},
    "gpt2": {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "n_inner": "intermediate_size",
        "activation_function": "hidden_act",
        "layer_norm_epsilon": "layer_norm_eps",
    },
    "granitemoehybrid": {"layers_block_type": "layer_types"},
    "qwen3_moe": {"num_experts": "num_local_experts"},
}
"""Keys that a model type has under a name of its own, and what most types call them."""

ARCHITECTURES = {
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_oss": "GptOssForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "llama": "LlamaForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
"""The architecture of each model type: a file may name only one of the two."""
MODEL_TYPES = {architecture: model_type for model_type, architecture in ARCHITECTURES.items()}

ALL_WINDOWED = ("mistral", "mixtral", "ministral", "ministral3", "phi3", "qwen3_moe", "starcoder2")
"""Model types whose every layer has the window, where the file has no `layer_types`."""
LAST_WINDOWED = ("qwen2", "qwen3")
"""Model types whose layers from `max_window_layers` on have the window, where `use_sliding_window` is true."""
NO_ROPE_WINDOWED = ("smollm3",)
"""Model types whose layers without rotary embedding have the window, where `use_sliding_window` is true."""
NEVER_WINDOWED = ("cohere", "glm", "glm4", "gpt2", "granite", "granitemoehybrid", "llama", "olmo2")
"""Model types that do not read `sliding_window`."""
LAST_IS_FULL = ("gemma4_text",)
"""Model types whose last layer sees all keys, whatever the pattern of the others."""
