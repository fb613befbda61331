"""fp8 and mxfp4 against their formulas, written out number by number; `integration_tests` compares transformers'."""

import ml_dtypes
import numpy as np
import pytest
from tiny_checkpoints import random_weights, write_directory, write_stored

from paged_attn_layer._src.convert.hf_directory import HFDirectory
from paged_attn_layer._src.convert.load import load_model
from paged_attn_layer._src.convert.quantised import read_quantisation
from paged_attn_layer._src.convert.source import ConversionError

FP8 = {"quant_method": "fp8", "weight_block_size": [4, 5]}
MXFP4 = {"quant_method": "mxfp4"}


def fp8(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape, scale=50).astype(ml_dtypes.float8_e4m3fn)


def weight_of(directory, name, stored, quantization):
    write_directory(directory, {}, quantization_config=quantization)
    write_stored(directory, stored)
    return HFDirectory(directory).weight(name)


@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu])
def test_fp8_in_blocks(tmp_path, scale_dtype):
    """The last blocks are not full."""
    q = fp8((10, 13))
    scale = np.exp2(np.random.default_rng(1).integers(-6, 3, (3, 3))).astype(scale_dtype)
    weight = weight_of(tmp_path, "a.weight", {"a.weight": q, "a.weight_scale_inv": scale}, FP8)
    want = [[float(q[i, j]) * float(scale[i // 4, j // 5]) for j in range(13)] for i in range(10)]
    np.testing.assert_array_equal(weight, np.float32(want))
    np.testing.assert_array_equal(weight.read((slice(3, 9), slice(4, 6))), np.float32(want)[3:9, 4:6])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_fp8_with_one_scale(tmp_path, shape):
    q = fp8((6, 7))
    stored = {"a.weight": q, "a.weight_scale_inv": np.full(shape, 0.5, np.float32), "a.activation_scale": np.ones(1)}
    weight = weight_of(tmp_path, "a.weight", stored, {**FP8, "weight_block_size": None})
    np.testing.assert_array_equal(weight, q.astype(np.float32) / 2)
    assert list(HFDirectory(tmp_path).shapes) == ["a.weight"]


def test_fp8_experts_in_one_array(tmp_path):
    q, scale = fp8((3, 8, 5)), np.arange(1, 7, dtype=np.float32).reshape(3, 2, 1)
    weight = weight_of(tmp_path, "experts", {"experts": q, "experts_scale_inv": scale}, FP8)
    np.testing.assert_array_equal(weight, q.astype(np.float32) * np.repeat(scale, 4, axis=1))


def test_fp8_experts_with_one_scale_each(tmp_path):
    q, scale = fp8((3, 8, 5)), np.float32([1, 2, 3]).reshape(3, 1, 1)
    block = {**FP8, "weight_block_size": None}
    weight = weight_of(tmp_path, "experts", {"experts": q, "experts_scale_inv": scale}, block)
    np.testing.assert_array_equal(weight, q.astype(np.float32) * scale)


def test_mxfp4(tmp_path):
    """The numbers of the specification: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, times a power of two."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 6, 3, 16), dtype=np.uint8)
    scales = rng.integers(117, 130, (2, 6, 3), dtype=np.uint8)
    scales[0, 0] = 0, 252, 127
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    want = np.zeros((2, 96, 6))
    for e, o, g, b in np.ndindex(blocks.shape):
        for half, bits in enumerate((blocks[e, o, g, b] & 15, blocks[e, o, g, b] >> 4)):
            sign = -1 if bits & 8 else 1
            want[e, 32 * g + 2 * b + half, o] = sign * numbers[bits & 7] * 2.0 ** (int(scales[e, o, g]) - 127)
    weight = weight_of(tmp_path, "gate_up", {"gate_up_blocks": blocks, "gate_up_scales": scales}, MXFP4)
    assert weight.shape == want.shape
    np.testing.assert_array_equal(weight, want.astype(np.float32))


def test_a_model_in_fp8(tmp_path):
    """Norms and embedding stay as they are, and the config is that of a plain model."""
    given = random_weights()
    stored, plain = {}, {}
    for name, weight in given.items():
        if "_proj" in name:
            stored[name] = weight.astype(ml_dtypes.float8_e4m3fn)
            stored[name + "_scale_inv"] = scale = np.full([-(-n // 128) for n in weight.shape], 0.25, np.float32)
            plain[name] = stored[name].astype(np.float32) * scale[0, 0]
        else:
            stored[name] = plain[name] = weight
    write_directory(tmp_path, {}, quantization_config={"quant_method": "fp8"})
    write_stored(tmp_path, stored)
    model = load_model(tmp_path)
    kernel = model.layers[1].mlp.down_proj.kernel[...]
    np.testing.assert_array_equal(kernel, plain["model.layers.1.mlp.down_proj.weight"].T)
    np.testing.assert_array_equal(model.norm.scale[...], given["model.norm.weight"])
    assert HFDirectory(tmp_path).config["quantization_config"] is None


@pytest.mark.parametrize(
    ("stored", "quantization", "problem"),
    [
        (
            {"a.weight": fp8((4, 4))},
            FP8,
            "a.weight is stored as float8_e4m3fn, and its a.weight_scale_inv is missing or unreadable",
        ),
        (
            {"a.weight": fp8((4, 6)), "a.weight_scale_inv": np.ones((1, 1), np.float32)},
            FP8,
            r"a.weight_scale_inv has shape \(1, 1\), which must be \(1, 2\) for \(4, 6\)",
        ),
        (
            {"a.weight": fp8((4,)), "a.weight_scale_inv": np.ones((1,), np.float32)},
            {**FP8, "weight_block_size": None},
            r"a.weight has shape \(4,\) and scales, and must have rows and columns",
        ),
        (
            {"a_blocks": np.ones((2, 3, 1, 16), np.uint8)},
            MXFP4,
            "a_blocks is stored as uint8, and a_scales is missing",
        ),
        (
            {"a_blocks": np.ones((2, 3, 1, 16), np.uint8), "a_scales": np.ones((2, 3), np.uint8)},
            MXFP4,
            r"a_blocks has shape \(2, 3, 1, 16\), which must be \(2, 3\) of its scales, and 16",
        ),
        ({"a.weight": fp8((4, 4))}, None, "1 weights in model.safetensors are stored as F8_E4M3"),
    ],
)
def test_weights_without_fitting_scales_are_problems(tmp_path, stored, quantization, problem):
    """Said with all others, before anything is loaded, and not also as missing."""
    write_directory(tmp_path, {}, quantization_config=quantization)
    write_stored(tmp_path, random_weights() | stored)
    with pytest.raises(ConversionError, match=problem) as caught:
        load_model(tmp_path)
    assert not any("missing:" in line for line in caught.value.problems)


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        ("awq", "use the checkpoint that it was made of, or use a GGUF file"),
        ("gptq", "use the checkpoint that it was made of"),
        ("bitsandbytes", r"call model.dequantize\(\), and save it with save_pretrained"),
        ("compressed-tensors", "or its fp8 variant"),
        ("other", "use the unquantised checkpoint"),
        (["fp8"], "use the unquantised checkpoint"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, method, advice):
    write_directory(tmp_path, random_weights(), quantization_config={"quant_method": method})
    with pytest.raises(
        NotImplementedError, match=rf"config\.json: .*quant_method={method!r}".replace("[", r"\[")
    ) as caught:
        load_model(tmp_path)
    assert caught.match(advice)


@pytest.mark.parametrize("block", [[128], [0, 1], [128, 128.0], "128", [True, 2]])
def test_blocks_that_mean_nothing(block):
    with pytest.raises(ValueError, match="must be two whole numbers, or null"):
        read_quantisation({"quant_method": "fp8", "weight_block_size": block})
