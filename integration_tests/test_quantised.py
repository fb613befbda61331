"""Weights in fp8 and mxfp4 are what transformers makes of them."""

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_checkpoints import write_directory
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from paged_attn_layer._src.convert.hf_directory import HFDirectory


def test_fp8(tmp_path):
    torch.manual_seed(0)
    q = (torch.randn(256, 384) * 100).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3) / 100
    write_directory(tmp_path, {}, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    save_file({"a.weight": q, "a.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    want = Fp8Dequantize(None)._dequantize_one(q, scale)
    np.testing.assert_array_equal(HFDirectory(tmp_path).weight("a.weight"), want.numpy())


def test_mxfp4(tmp_path):
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 8, 2), dtype=torch.uint8)
    write_directory(tmp_path, {}, quantization_config={"quant_method": "mxfp4"})
    save_file({"a_blocks": blocks, "a_scales": scales}, tmp_path / "model.safetensors")
    want = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    np.testing.assert_array_equal(HFDirectory(tmp_path).weight("a"), want.numpy())
