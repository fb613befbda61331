"""Which Hugging Face weight goes where in our model: one table a family."""

import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np

from paged_attn_layer._src.convert.source import ConversionError, WeightSource

Shape = tuple[int, ...]


def keep(weight: np.ndarray) -> np.ndarray:
    """The weight as it is."""
    return weight


def transpose(weight: np.ndarray) -> np.ndarray:
    """Hugging Face's `[out, in]` as our `[in, out]`."""
    return weight.T


@dataclasses.dataclass(frozen=True)
class Rule:
    """Weights whose name matches `pattern` wholly go to `path`, changed by `transform`."""

    pattern: str
    path: str
    transform: Callable[[np.ndarray], np.ndarray] = keep


LLAMA_RULES = (
    Rule(r"model\.embed_tokens\.weight", r"embed.embedding"),
    Rule(r"model\.norm\.weight", r"norm.scale"),
    Rule(r"lm_head\.weight", r"lm_head"),
    Rule(r"model\.layers\.(\d+)\.input_layernorm\.weight", r"layers.\1.attention_norm.scale"),
    Rule(r"model\.layers\.(\d+)\.self_attn\.([qkvo])_proj\.weight", r"layers.\1.attention.\2_proj.kernel", transpose),
    Rule(r"model\.layers\.(\d+)\.self_attn\.([qkvo])_proj\.bias", r"layers.\1.attention.\2_proj.bias"),
    Rule(r"model\.layers\.(\d+)\.post_attention_layernorm\.weight", r"layers.\1.mlp_norm.scale"),
    Rule(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight", r"layers.\1.mlp.\2_proj.kernel", transpose),
    Rule(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.bias", r"layers.\1.mlp.\2_proj.bias"),
)
"""Llama, Mistral and Qwen2."""

IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
"""Weights of old checkpoints that follow from the config."""


@dataclasses.dataclass(frozen=True)
class Filling:
    """Where the value of one of the model's weights comes from."""

    name: str
    transform: Callable[[np.ndarray], np.ndarray]


def plan(
    source: WeightSource, targets: Mapping[str, Shape], rules: tuple[Rule, ...], *, tied: bool
) -> dict[str, Filling]:
    """For each of the model's weights the checkpoint's weight that fills it.

    Args:
        source: the checkpoint.
        targets: shapes of the model's weights by path.
        rules: the family's table.
        tied: whether the head is the embedding, so that a copy of it in the checkpoint is not needed.

    Raises:
        ConversionError: a file is unreadable, or a weight is left over, missing or of another shape. Lists them all.
    """
    ignored = (*IGNORED, r"lm_head\.weight") if tied else IGNORED
    if source.problems and not source.shapes:  # no weight could be read: nothing to add for each of the model's
        raise ConversionError(source.where, source.problems)
    problems = list(source.problems)
    fillings: dict[str, Filling] = {}
    for name, shape in source.shapes.items():
        if any(re.fullmatch(pattern, name) for pattern in ignored):
            continue
        path, filling = _match(name, rules)
        if filling is None or path not in targets:
            problems.append(f"{name} {shape} has no place in the model; is config.json this checkpoint's own?")
            continue
        fillings[path] = filling
        problems += _misshapen(name, shape, path, filling, targets[path])
    problems += [
        f"{path} {targets[path]} of the model is filled by no weight; the checkpoint is not complete"
        for path in targets
        if path not in fillings
    ]
    if problems:
        raise ConversionError(source.where, problems)
    return fillings


def _match(name: str, rules: tuple[Rule, ...]) -> tuple[str, Filling | None]:
    for rule in rules:
        found = re.fullmatch(rule.pattern, name)
        if found:
            return found.expand(rule.path), Filling(name, rule.transform)
    return "", None


def _misshapen(name: str, shape: Shape | None, path: str, filling: Filling, want: Shape) -> list[str]:
    if shape is None:  # unreadable, and named as such already
        return []
    becomes = filling.transform(np.broadcast_to(np.float32(0), shape)).shape
    if becomes == want:
        return []
    return [f"{name} {shape} becomes {path} {becomes}, which must be {want}; is config.json this checkpoint's own?"]
