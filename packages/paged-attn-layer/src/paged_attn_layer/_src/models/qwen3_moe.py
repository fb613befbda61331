"""The Qwen3-MoE family: Qwen3's attention, and experts in place of the MLP of all layers or some."""

import dataclasses

from paged_attn_layer._src.blocks.moe import MoEConfig
from paged_attn_layer._src.blocks.router import RouterConfig
from paged_attn_layer._src.convert.weights import WeightRule
from paged_attn_layer._src.models import llama
from paged_attn_layer._src.models.decoder_config import DecoderConfig, LayerConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.qwen3 import read_qwen3_attentions
from paged_attn_layer._src.models.read_decoder import read_decoder, read_mlp, read_norm
from paged_attn_layer._src.models.weight_rules import experts, router
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a Qwen3-MoE model."""
    norm, mlp = read_norm(config), read_mlp(config)
    chosen = RouterConfig(
        num_experts=config.whole("num_local_experts"),
        experts_per_token=config.whole("num_experts_per_tok"),
        renormalise=config.flag("norm_topk_prob", False),
    )
    moe = MoEConfig(
        router=chosen, expert=dataclasses.replace(mlp, intermediate_size=config.whole("moe_intermediate_size"))
    )
    dense, interval = _dense_layers(config), config.whole("decoder_sparse_step")
    layers = [
        LayerConfig(attention=each, mlp=mlp if index in dense or (index + 1) % interval else moe, pre_norm=norm)
        for index, each in enumerate(read_qwen3_attentions(config))
    ]
    return read_decoder(config, layers, norm)


def _dense_layers(config: HFConfig) -> set[int]:
    """The layers that have an MLP whatever the interval says."""
    layers, given = config.whole("num_hidden_layers"), config.get("mlp_only_layers") or []
    if not isinstance(given, list) or any(type(each) is not int or not 0 <= each < layers for each in given):
        raise ValueError(f"mlp_only_layers={given!r} must be a list of layers from 0 to {layers - 1}")
    return set(given)


def weights(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The rules of a Qwen3-MoE model."""
    return (*llama.weights(config), *router(), *experts(config))


FAMILY = decoder_family(
    architectures=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    read_config=read_config,
    weights=weights,
)
