"""The Mistral family (Mistral, Ministral): Llama's form, with a sliding window in every layer, or in those named."""

from paged_attn_layer._src.models import llama
from paged_attn_layer._src.models.decoder_family import decoder_family

# llama.cpp stores Mistral's models as files of architecture `llama`.
FAMILY = decoder_family(
    architectures=("MistralForCausalLM", "MinistralForCausalLM"),
    model_types=("mistral", "ministral"),
    read_config=llama.read_llama_like,
    weights=llama.weights,
)
