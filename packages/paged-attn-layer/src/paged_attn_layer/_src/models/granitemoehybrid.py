"""The Granite 4 family (dense models): Granite's form; models with Mamba layers or experts are refused."""

import dataclasses

from paged_attn_layer._src.convert.operations import Split, Transpose
from paged_attn_layer._src.convert.weights import WeightRule, rename
from paged_attn_layer._src.models import granite, llama
from paged_attn_layer._src.models.decoder_config import DecoderConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.weight_rules import OURS, THEIRS
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a Granite 4 model without Mamba layers and experts.

    Raises:
        NotImplementedError: the model has either of them.
    """
    if experts := config.whole("num_local_experts", least=0):
        raise NotImplementedError(f"num_local_experts={experts} is not supported in Granite 4; 0 is (dense models)")
    config = config.replace({"intermediate_size": config.whole("shared_intermediate_size"), "mlp_bias": False})
    decoder = granite.read_config(config)
    return decoder if config.text("position_embedding_type", "") == "rope" else _without_rope(decoder)


def weights(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """Llama's rules, with gate and up in one weight."""
    size = config.layers[0].mlp.intermediate_size
    gate_and_up = tuple(f"{OURS}.mlp.{name}_proj.kernel" for name in ("gate", "up"))
    return (
        WeightRule((f"{THEIRS}.shared_mlp.input_linear.weight",), gate_and_up, (Split(0, (size, size)), Transpose())),
        rename(f"{THEIRS}.shared_mlp.output_linear.weight", f"{OURS}.mlp.down_proj.kernel", Transpose()),
        *llama.weights(config),
    )


def _without_rope(decoder: DecoderConfig) -> DecoderConfig:
    layers = (
        dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, rope=None))
        for layer in decoder.layers
    )
    return dataclasses.replace(decoder, layers=tuple(layers))


FAMILY = decoder_family(
    architectures=("GraniteMoeHybridForCausalLM",),
    model_types=("granitemoehybrid",),
    read_config=read_config,
    weights=weights,
)
