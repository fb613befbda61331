"""The DeepSeek-V2 family: latent attention; the first layers dense, the others with experts and shared experts."""

import dataclasses
from typing import cast

from paged_attn_layer._src.blocks.latent_attention import LatentAttentionConfig
from paged_attn_layer._src.blocks.mlp import MLPConfig
from paged_attn_layer._src.blocks.moe import MoEConfig
from paged_attn_layer._src.blocks.norm import NormConfig
from paged_attn_layer._src.blocks.router import RouterConfig
from paged_attn_layer._src.convert.operations import Reshape, Split
from paged_attn_layer._src.convert.weights import WeightRule, linear, rename
from paged_attn_layer._src.models import llama
from paged_attn_layer._src.models.decoder_config import DecoderConfig, LayerConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.read_decoder import read_decoder, read_mlp, read_norm
from paged_attn_layer._src.models.read_rope import read_latent_scale, read_rope
from paged_attn_layer._src.models.weight_rules import OURS, THEIRS, experts, router
from paged_cache import HFConfig

_LATENT_NORM = NormConfig(eps=1e-6)
"""transformers leaves the norms of latent vectors at this, whatever `rms_norm_eps` is."""


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a DeepSeek-V2 model."""
    check_fixed(config, {"scoring_func": "softmax", "norm_topk_prob": False})
    attention = read_latent_attention(config, interleaved=True)
    return read_deepseek(config, attention, _router(config), mlp_bias=config.flag("mlp_bias", False))


def _router(config: HFConfig) -> RouterConfig:
    method = config.text("topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise NotImplementedError(f"topk_method={method!r} is not supported; greedy and group_limited_greedy are")
    grouped = method == "group_limited_greedy"
    return RouterConfig(
        num_experts=config.whole("num_local_experts"),
        experts_per_token=config.whole("num_experts_per_tok"),
        expert_groups=config.whole("n_group") if grouped else 1,
        groups_per_token=config.whole("topk_group") if grouped else 1,
        scale=config.number("routed_scaling_factor"),
    )


def read_latent_attention(config: HFConfig, *, interleaved: bool) -> LatentAttentionConfig:
    """The attention of all layers; DeepSeek-V3 has the same.

    Args:
        config: the config.json.
        interleaved: true if rotary embedding pairs neighbouring elements.
    """
    heads = config.whole("num_attention_heads")
    check_fixed(config, {"num_key_value_heads": heads})
    nope, rope = config.whole("qk_nope_head_dim"), config.whole("qk_rope_head_dim")
    turning = read_rope(config, rope, interleaved=interleaved)
    if turning is None:
        raise ValueError("rope_parameters gives null for full_attention; latent attention must have rotary settings")
    return LatentAttentionConfig(
        hidden_size=config.whole("hidden_size"),
        num_heads=heads,
        q_rank=config.whole("q_lora_rank") if config.has("q_lora_rank") else None,
        kv_rank=config.whole("kv_lora_rank"),
        nope_dim=nope,
        rope_dim=rope,
        v_head_dim=config.whole("v_head_dim"),
        latent_norm=_LATENT_NORM,
        rope=turning,
        use_bias=config.flag("attention_bias", False),
        softmax_scale=(nope + rope) ** -0.5 * read_latent_scale(config),
    )


def read_deepseek(
    config: HFConfig, attention: LatentAttentionConfig, chosen: RouterConfig, *, mlp_bias: bool = False
) -> DecoderConfig:
    """The decoder whose first `first_k_dense_replace` layers have an MLP, and the others this router and its experts.

    Args:
        config: the config.json.
        attention: of all layers.
        chosen: which experts compute a token.
        mlp_bias: true if MLPs and shared experts add a bias.
    """
    check_fixed(config, {"moe_layer_freq": 1})
    norm, mlp = read_norm(config), read_mlp(config, use_bias=mlp_bias)
    size, shared = config.whole("moe_intermediate_size"), config.whole("n_shared_experts")

    def expert(count: int, use_bias: bool) -> MLPConfig:
        return dataclasses.replace(mlp, intermediate_size=count * size, use_bias=use_bias)

    moe = MoEConfig(router=chosen, expert=expert(1, False), shared=expert(shared, mlp_bias))
    dense = config.whole("first_k_dense_replace", least=0)
    layers = [
        LayerConfig(attention=attention, mlp=mlp if layer < dense else moe, pre_norm=norm)
        for layer in range(config.whole("num_hidden_layers"))
    ]
    return read_decoder(config, layers, norm)


def check_fixed(config: HFConfig, values: dict[str, object]) -> None:
    """Refuse a model for which a key has another value than the one that is supported.

    Raises:
        NotImplementedError: names the key.
    """
    for key, value in values.items():
        if config.has(key) and config.get(key) != value:
            raise NotImplementedError(f"{key}={config.get(key)!r} is not supported; {value!r} is")


def weights(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The rules of a DeepSeek-V2 model. `kv_b_proj` has the keys' and the values' matrix of each head in turn."""
    theirs, ours = f"{THEIRS}.self_attn", f"{OURS}.attention"
    attention = cast(LatentAttentionConfig, config.layers[0].attention)
    heads, nope, rank = attention.num_heads, attention.nope_dim, attention.kv_rank
    parts = (nope, attention.v_head_dim)
    up = Reshape((heads * sum(parts), rank), (heads, sum(parts), rank)), Split(axis=1, sizes=parts)
    return (
        *llama.weights(config),
        *linear(f"{theirs}.{{q_a|q_b}}_proj", f"{ours}.{{q_a|q_b}}_proj"),
        *linear(f"{theirs}.kv_a_proj_with_mqa", f"{ours}.kv_a_proj"),
        rename(f"{theirs}.{{q|kv}}_a_layernorm.weight", f"{ours}.{{q|kv}}_a_norm.scale"),
        WeightRule((f"{theirs}.kv_b_proj.weight",), (f"{ours}.k_up", f"{ours}.v_up"), up),
        *router(),
        *experts(config),
        *linear(f"{THEIRS}.mlp.shared_experts.{{gate|up|down}}_proj", f"{OURS}.mlp.shared.{{gate|up|down}}_proj"),
    )


FAMILY = decoder_family(
    architectures=("DeepseekV2ForCausalLM",),
    model_types=("deepseek_v2",),
    read_config=read_config,
    weights=weights,
)
