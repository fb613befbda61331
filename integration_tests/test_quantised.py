"""Weights in fp8 and mxfp4 are what transformers makes of them, alone and in a model."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from family_cases import CASES, TEXT
from parity import Parity, assert_close
from safetensors.torch import save_file
from tiny_checkpoints import write_directory
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from paged_attn_layer import load_model
from paged_attn_layer._src.convert.hf_directory import HFDirectory

FP8 = {"quant_method": "fp8", "weight_block_size": [8, 8]}


def fp8(rows, columns):
    """A weight of these sizes with its scales, and what transformers makes of them."""
    q, scale = (torch.randn(rows, columns) * 100).to(torch.float8_e4m3fn), torch.rand(rows // 8, columns // 8) / 500
    return {"": q, "_scale_inv": scale}, Fp8Dequantize(None)._dequantize_one(q, scale)


def mxfp4(experts, rows, columns):
    """Matrices `[columns, rows]` of experts with their scales, and what transformers makes of them."""
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    scales = torch.randint(120, 125, (experts, rows, columns // 32), dtype=torch.uint8)
    return {"_blocks": blocks, "_scales": scales}, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)


@pytest.mark.parametrize(
    ("made", "quantization"),
    [(lambda: fp8(256, 384), FP8), (lambda: mxfp4(3, 8, 64), {"quant_method": "mxfp4"})],
    ids=["fp8", "mxfp4"],
)
def test_one_weight(tmp_path, made, quantization):
    torch.manual_seed(0)
    stored, want = made()
    write_directory(tmp_path, {}, quantization_config=quantization)
    save_file({f"a{part}": tensor for part, tensor in stored.items()}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(HFDirectory(tmp_path).weight("a"), want.numpy())


def quantise(parity, names, made, quantization):
    """Gives transformers' model new weights of these names, and the directory the same weights quantised."""
    plain = {name: weight.clone() for name, weight in parity.hf.state_dict().items()}
    for name in names:
        stored, weight = made(*plain.pop(name).shape)
        parity.hf.state_dict()[name].copy_(weight)
        plain |= {f"{name}{part}": tensor for part, tensor in stored.items()}
    save_file(plain, parity.directory / "model.safetensors")
    config = json.loads((parity.directory / "config.json").read_text())
    (parity.directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def test_gpt_oss_in_mxfp4(tmp_path):
    case = next(case for case in CASES if case.model_type == "gpt_oss")
    sizes = {**case.settings, "hidden_size": 64, "intermediate_size": 32}
    parity = Parity(dataclasses.replace(case, settings=sizes), tmp_path)
    names = [name for name in parity.hf.state_dict() if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(names) > 2
    quantise(parity, names, lambda experts, inputs, rows: mxfp4(experts, rows, inputs), {"quant_method": "mxfp4"})
    parity.model = load_model(tmp_path)
    assert_close(parity.runner().feed(TEXT, [len(TEXT)]), parity.expected)


def test_qwen3_in_fp8(tmp_path):
    case = next(case for case in CASES if case.model_type == "qwen3")
    parity = Parity(dataclasses.replace(case, settings={**case.settings, "head_dim": 8}), tmp_path)
    names = [name for name in parity.hf.state_dict() if name.endswith("_proj.weight")]
    assert len(names) > 10
    quantise(parity, names, fp8, FP8)
    parity.model = load_model(tmp_path)
    assert_close(parity.runner().feed(TEXT, [len(TEXT)]), parity.expected)
