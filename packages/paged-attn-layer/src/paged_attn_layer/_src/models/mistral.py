"""The Mistral family: Llama's form, with a sliding window in every layer."""

from paged_attn_layer._src.models import llama
from paged_attn_layer._src.models.decoder_family import decoder_family

# llama.cpp stores Mistral's models as files of architecture `llama`.
FAMILY = decoder_family(
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    read_config=llama.read_llama_like,
    weights=llama.weights,
)
