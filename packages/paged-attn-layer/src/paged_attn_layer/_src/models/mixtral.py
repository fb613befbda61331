"""The Mixtral family: Mistral's attention, and experts in place of the MLP."""

from paged_attn_layer._src.blocks.moe import MoEConfig
from paged_attn_layer._src.blocks.router import RouterConfig
from paged_attn_layer._src.convert.weights import WeightRule
from paged_attn_layer._src.models import llama
from paged_attn_layer._src.models.decoder_config import DecoderConfig, LayerConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.read_decoder import read_attentions, read_decoder, read_mlp, read_norm
from paged_attn_layer._src.models.weight_rules import experts, router
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a Mixtral model."""
    norm = read_norm(config)
    chosen = RouterConfig(
        num_experts=config.whole("num_local_experts"),
        experts_per_token=config.whole("num_experts_per_tok"),
        renormalise=True,
    )
    moe = MoEConfig(router=chosen, expert=read_mlp(config))
    layers = [LayerConfig(attention=each, mlp=moe, pre_norm=norm) for each in read_attentions(config)]
    return read_decoder(config, layers, norm)


def weights(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The rules of a Mixtral model. Its checkpoints call the gate `w1`, the way down `w2`, and the way up `w3`."""
    return (
        *llama.weights(config),
        *router("block_sparse_moe.gate"),
        *router("mlp.gate"),
        *experts(config, "block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"}),
    )


FAMILY = decoder_family(
    architectures=("MixtralForCausalLM",),
    model_types=("mixtral",),
    read_config=read_config,
    weights=weights,
)
