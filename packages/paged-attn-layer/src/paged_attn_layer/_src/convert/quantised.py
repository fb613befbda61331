"""Quantised weights of Hugging Face directories, made plain on the way: blocks of fp8, and mxfp4.

    fp8     weight[i, j] = q[i, j] * weight_scale_inv[i // 128, j // 128]          q: float8_e4m3fn
    mxfp4   weight[i, 32 g + n] = e2m1(nibble n of blocks[i, g]) * 2^(scales[i, g] - 127)

fp8: DeepSeek-V3's format (inference/kernel.py in deepseek-ai/DeepSeek-V3), also Qwen3's. mxfp4: gpt-oss's format, from
the OCP Microscaling Formats specification; the low nibble of a byte comes first.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from paged_attn_layer._src.convert.lazy import LazyArray, Shape
from paged_attn_layer._src.convert.operations import Stack, Transpose, Unstack

Weights = dict[str, LazyArray | None]
"""Weights by name; `None` for one that cannot be read."""

_SCALE, _ACTIVATION_SCALE = "_scale_inv", ".activation_scale"
_BLOCKS, _SCALES = "_blocks", "_scales"
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The number that each 4 bits stand for: sign, two bits of exponent, one of mantissa."""
_BIAS = 127
"""What is added to an exponent that is stored in a byte."""
_ADVICE = {
    "awq": "use the checkpoint that it was made of",
    "gptq": "use the checkpoint that it was made of",
    "bitsandbytes": "load it with transformers, call model.dequantize(), and save it with save_pretrained",
    "compressed-tensors": "use the checkpoint that it was made of, or its fp8 variant with blocks",
}


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """A quantised format that is read."""

    kinds: tuple[str, ...]
    """Types that it stores weights and scales in, beside those of plain weights."""
    dequantise: Callable[[Weights], tuple[Weights, list[str]]]
    """Makes plain weights of stored ones, and says what is wrong with them, a line each. Others stay as they are."""


def read_quantisation(settings: Any) -> Quantisation | None:
    """The format that the `quantization_config` of a config.json names; `None` if there is none.

    Raises:
        NotImplementedError: the format is not supported; names it, and says what to do.
        ValueError: the size of its blocks means nothing.
    """
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    if method == "fp8":
        block = _block(settings)
        return Quantisation(("F8_E4M3", "F8_E8M0", "U8"), lambda weights: _from_fp8(weights, block))
    if method == "mxfp4":
        return Quantisation(("U8",), _from_mxfp4)
    advice = _ADVICE.get(method if isinstance(method, str) else "", "use the unquantised checkpoint")
    raise NotImplementedError(
        f"weights quantised with quant_method={method!r} are not supported (fp8 and mxfp4 are); {advice}, "
        "or use a GGUF file"
    )


def _block(settings: Mapping[str, Any]) -> Shape | None:
    """Rows and columns that share a scale; `None` if all of a weight do."""
    block = settings.get("weight_block_size", [128, 128])
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
        raise ValueError(f"weight_block_size={block!r} of quantization_config must be two whole numbers, or null")
    return block[0], block[1]


def _from_fp8(stored: Weights, block: Shape | None) -> tuple[Weights, list[str]]:
    """The weights without their scales. Scales of activations are left out: what is plain needs none."""
    weights, problems = {}, []
    for name, weight in stored.items():
        if name.endswith((_SCALE, _ACTIVATION_SCALE)):
            continue
        scale = stored.get(name + _SCALE)
        if weight is None or (scale is None and not _is_packed(weight)):
            weights[name] = weight
        elif scale is None:
            weights[name] = None
            problems.append(f"{name} is stored as {weight.dtype}, and its {name + _SCALE} is missing or unreadable")
        elif len(weight.shape) < 2:
            weights[name] = None
            problems.append(f"{name} has shape {weight.shape} and scales, and must have rows and columns")
        elif scale.shape not in (want := _scale_shapes(weight.shape, block)):
            weights[name] = None
            problems.append(f"{name + _SCALE} has shape {scale.shape}, which must be {want[0]} for {weight.shape}")
        else:
            weights[name] = _each_matrix(lambda q, s: _scaled(q, s, block), weight, scale)
    return weights, problems


def _scale_shapes(shape: Shape, block: Shape | None) -> tuple[Shape, ...]:
    """The shapes that the scales of a weight may have."""
    *outer, rows, columns = shape
    if block is None:
        return ((*outer, 1, 1),) if outer else ((1,), (), (1, 1))
    return ((*outer, -(-rows // block[0]), -(-columns // block[1])),)


def _scaled(weight: LazyArray, scale: LazyArray, block: Shape | None) -> LazyArray:
    rows, columns = block or (max(1, weight.shape[0]), max(1, weight.shape[1]))
    column = np.arange(weight.shape[1]) // columns

    def read(start: int, stop: int) -> np.ndarray:
        scales = _factors(scale).reshape(-1, scale.shape[-1] if block else 1)
        return _wide(weight, start, stop) * scales[np.arange(start, stop) // rows][:, column]

    return LazyArray.of_rows(weight.shape, np.float32, read)


def _factors(scale: LazyArray) -> np.ndarray:
    """The scales in float32. A byte is an exponent."""
    return np.exp2(scale.read(dtype=np.float32) - _BIAS) if scale.dtype == np.uint8 else scale.read(dtype=np.float32)


def _wide(weight: LazyArray, start: int, stop: int) -> np.ndarray:
    """Rows of a matrix in float32. Types of 8 bits are looked up, which is faster than a cast."""
    rows = weight.read((slice(start, stop), slice(0, weight.shape[1])))
    if weight.dtype.itemsize > 1:
        return rows.astype(np.float32)
    return np.arange(256, dtype=np.uint8).view(weight.dtype).astype(np.float32)[rows.view(np.uint8)]


def _from_mxfp4(stored: Weights) -> tuple[Weights, list[str]]:
    """The weights without their scales: `name_blocks [expert, out, groups, 16]` becomes `name [expert, in, out]`."""
    weights, problems = {}, []
    for name, weight in stored.items():
        base = name.removesuffix(_BLOCKS)
        if name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS in stored:
            continue
        if weight is None or not _is_packed(weight):
            weights[base] = weight
            continue
        scales = stored.get(base + _SCALES)
        weights[base] = None
        if base == name or scales is None:
            problems.append(f"{name} is stored as uint8, and {base + _SCALES} is missing or unreadable")
        elif len(weight.shape) < 3 or weight.shape != (*scales.shape, 16):
            problems.append(f"{name} has shape {weight.shape}, which must be {scales.shape} of its scales, and 16")
        else:
            weights[base] = Transpose().apply([_each_matrix(_unpacked, weight, scales, axes=3)])[0]
    return weights, problems


def _unpacked(blocks: LazyArray, scales: LazyArray) -> LazyArray:
    shape = (blocks.shape[0], blocks.shape[1] * 32)

    def read(start: int, stop: int) -> np.ndarray:
        rows = slice(start, stop)
        packed = blocks.read((rows, slice(0, blocks.shape[1]), slice(0, 16)))
        nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(stop - start, blocks.shape[1], 32)
        exponents = scales.read((rows, slice(0, scales.shape[1])), np.int32) - _BIAS
        return np.ldexp(_E2M1[nibbles], exponents[..., None]).reshape(stop - start, shape[1])

    return LazyArray.of_rows(shape, np.float32, read)


def _each_matrix(
    make: Callable[[LazyArray, LazyArray], LazyArray], weight: LazyArray, scale: LazyArray, axes: int = 2
) -> LazyArray:
    """`make` of each matrix and its scales, stacked again: of each expert. A matrix has so many stored `axes`."""
    if len(weight.shape) <= axes:
        return make(weight, scale)
    count = weight.shape[0]
    pairs = zip(Unstack(count).apply([weight]), Unstack(count).apply([scale]), strict=True)
    return Stack(count).apply([_each_matrix(make, *pair, axes=axes) for pair in pairs])[0]


def _is_packed(weight: LazyArray) -> bool:
    return weight.dtype.itemsize == 1
