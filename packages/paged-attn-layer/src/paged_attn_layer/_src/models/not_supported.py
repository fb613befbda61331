"""Well-known architectures that are not supported, and what is missing for each."""

from collections.abc import Mapping

MISSING: Mapping[str, tuple[str, ...]] = {
    "layers with a recurrent state beside the pages": (
        *("BailingHybridForCausalLM", "BambaForCausalLM", "FalconH1ForCausalLM", "FalconMambaForCausalLM"),
        *("JambaForCausalLM", "KimiLinearForCausalLM", "Lfm2ForCausalLM", "Lfm2MoeForCausalLM", "MambaForCausalLM"),
        *("Mamba2ForCausalLM", "MiniMaxForCausalLM", "NemotronHForCausalLM", "OlmoHybridForCausalLM"),
        *("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "RecurrentGemmaForCausalLM"),
        *("RwkvForCausalLM", "ZambaForCausalLM", "Zamba2ForCausalLM"),
    ),
    "an index that chooses which keys a query sees": ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"),
    "compressed keys beside the pages": ("DeepseekV4ForCausalLM",),
    "layers that see one chunk of the keys, and norms of queries and keys after rotary embedding": (
        *("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    ),
    "several streams of hidden rows, and sparse activations": (
        *("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"),
    ),
    "an encoder, and layers that see its keys": (
        *("BartForConditionalGeneration", "T5ForConditionalGeneration", "WhisperForConditionalGeneration"),
    ),
    "pictures and sound": (
        *("Glm4vForConditionalGeneration", "Idefics3ForConditionalGeneration", "LlavaForConditionalGeneration"),
        *("MllamaForConditionalGeneration", "PaliGemmaForConditionalGeneration"),
        *("Phi4MultimodalForCausalLM", "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
        *("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"),
        *("SmolVLMForConditionalGeneration", "VoxtralForConditionalGeneration"),
    ),
}
"""Names from the `architectures` of a config.json by what their models need and do not find here."""


def what_is_missing(architecture: str | None) -> str:
    """What a well-known architecture needs that is not supported, as the end of a sentence; empty for any other.

    >>> what_is_missing("DeepseekV4ForCausalLM")
    ': it needs compressed keys beside the pages'
    """
    return next((f": it needs {need}" for need, names in MISSING.items() if architecture in names), "")
