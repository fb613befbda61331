"""The DeepSeek-V3 family (DeepSeek-V3 and R1, Kimi K2): DeepSeek-V2's layers, and experts chosen by sigmoid scores."""

from paged_attn_layer._src.blocks.router import RouterConfig
from paged_attn_layer._src.convert.weights import WeightRule, rename, unused
from paged_attn_layer._src.models import deepseek_v2
from paged_attn_layer._src.models.decoder_config import DecoderConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.weight_rules import OURS, THEIRS
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a DeepSeek-V3 model."""
    deepseek_v2.check_fixed(config, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"})
    attention = deepseek_v2.read_latent_attention(config, interleaved=config.flag("rope_interleave"))
    chosen = RouterConfig(
        num_experts=config.whole("num_local_experts"),
        experts_per_token=config.whole("num_experts_per_tok"),
        score="sigmoid",
        use_choice_bias=True,
        expert_groups=config.whole("n_group"),
        groups_per_token=config.whole("topk_group"),
        group_score="two_largest",
        renormalise=config.flag("norm_topk_prob"),
        scale=config.number("routed_scaling_factor"),
    )
    return deepseek_v2.read_deepseek(config, attention, chosen)


def weights(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The rules of a DeepSeek-V3 model. The layer after its last predicts a second token, and is not used."""
    return (
        *deepseek_v2.weights(config),
        rename(f"{THEIRS}.mlp.gate.e_score_correction_bias", f"{OURS}.mlp.router.choice_bias"),
        unused(f"model.layers.{len(config.layers)}.{{...}}"),
    )


FAMILY = decoder_family(
    architectures=("DeepseekV3ForCausalLM",),
    model_types=("deepseek_v3",),
    read_config=read_config,
    weights=weights,
)
