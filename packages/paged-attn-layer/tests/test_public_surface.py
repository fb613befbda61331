"""What can be imported from `paged_attn_layer` is a promise: changing this list changes version and changelog."""

import inspect

import paged_attn_layer

NAMES = {
    "Attended": "What `attend` returns.",
    "AttentionConfig": "Sizes of one attention layer, and what is computed in it. Static and hashable.",
    "CausalLM": "What the engine asks of a model: which cache its layers need, and one call that computes a step.",
    "Completion": "The answer to one prompt.",
    "ConversionError": "A checkpoint does not fit its model. The message lists every problem, a line each.",
    "ConversionReport": "What `convert_checkpoint` did.",
    "Decoder": "A decoder, a `CausalLM`: from the tokens of a step to logits of the rows asked for.",
    "DecoderConfig": "Sizes and switches of a `Decoder`. Static and hashable.",
    "Engine": "Serves many requests at once from one paged KV cache: sampling, continuous batching, chunked prefill.",
    "EngineConfig": "The sizes of an engine and of its cache.",
    "EngineStats": "The steps since warm-up, and totals and rates over them.",
    "Family": "A model family. Each is one file, `models/<family>.py`, and one entry of `models/registry.py`.",
    "LayerConfig": "One layer of a decoder. Static and hashable; equal layers are traced and compiled once.",
    "ClampedGLU": "The activation of gpt-oss, of a gate `g` and `u`: `g sigmoid(alpha g) (u + 1)`.",
    "LatentAttentionConfig": "Sizes of a layer of multi-head latent attention. Static and hashable.",
    "MoEConfig": "A mixture of experts. Static and hashable.",
    "RouterConfig": "How experts are chosen for a token with hidden row `x`. Static and hashable.",
    "MLPConfig": "Sizes of a feed-forward block, and what is computed in it. Static and hashable.",
    "NormConfig": "How the last axis `x` of an array is normalised. Static and hashable.",
    "PagedAttention": "Self-attention of a step's tokens, with their keys and values kept in pages.",
    "Request": "A prompt to continue. The caller sets the arguments of the constructor; the scheduler sets all other "
    "fields.",
    "RopeConfig": "How far a position turns each pair of a head's elements; the names are those of a Hugging Face "
    "config.",
    "SamplingParams": "How the tokens of an answer are chosen, and what ends it. The default is greedy: the likeliest "
    "token.",
    "StepRecord": "One step. Times are in seconds.",
    "Tokenizer": "The methods of a tokenizer that the engine calls. Tokenizers of transformers have them.",
    "WeightFunction": "Weights that a function makes when they are needed, under Hugging Face's names.",
    "apply_rope": "`x` with each head turned by its position, computed in float32 and returned in `x.dtype`.",
    "attend": "Write the step's keys and values into one layer's pages, and attend over the pages.",
    "convert_checkpoint": "Writes the weights of any source of `load_model` to a new directory, which `load_model` "
    "reads too.",
    "find_family": "The family of a config.json: by its `architectures`, or by its `model_type` if it has none.",
    "load_model": "The model of a Hugging Face directory, a GGUF file, an orbax checkpoint, or arrays by name; without "
    "torch.",
    "load_tokenizer": "The tokenizer of a Hugging Face directory or a GGUF file, chat template included.",
    "on_mesh": "Returns the view split over the call's mesh: as it was split before, else by KV heads.",
    "prepare": "Returns the batch with what the kernels derive from it. Make it once per step, for all layers that are "
    "alike.",
    "read_config": "The config of the family that a parsed config.json names: what the family's model is built from.",
    "save_model": "Writes a model to a new directory, which `load_model` reads: the inverse of loading, bit for bit.",
}
"""Each public name, and the first line of its docstring."""
EASYDEL_NAMES = {
    "AttentionImpl": "One attention implementation; a call runs the `forward_*` of the platform.",
    "AttentionMetadata": "The options of an attention implementation: everything but the arrays. Hashable; all are "
    "optional.",
    "AttentionOutput": "What an attention implementation returns.",
    "AttentionRegistry": "The registered attention implementations, by name.",
    "PagedAttn": "Attention of a step's tokens over the pages of their sequences: `attend`, in EasyDeL's shapes.",
}
"""Names and meanings of EasyDeL's operator (2025)."""
VALUES = {"FinishReason", "__version__"}
"""Public names that can have no docstring of their own."""


def test_every_public_name_says_in_one_line_what_it_is():
    first_lines = {
        name: str(inspect.getdoc(getattr(paged_attn_layer, name))).splitlines()[0]
        for name in paged_attn_layer.__all__
        if name not in VALUES
    }
    assert first_lines == NAMES | EASYDEL_NAMES


def test_nothing_else_is_public():
    assert set(paged_attn_layer.__all__) == {*NAMES, *EASYDEL_NAMES, *VALUES}


def test_private_modules_are_named_so():
    modules = {name for name, value in vars(paged_attn_layer).items() if inspect.ismodule(value)}
    assert {name for name in modules if not name.startswith("_")} == set()
