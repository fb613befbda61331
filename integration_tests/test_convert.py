"""What we write, transformers reads: to the same logits, whatever the way."""

import numpy as np
import pytest
import torch
import transformers
from family_cases import CASES, TEXT
from paged_runner import PagedRunner
from parity import Parity, assert_close
from safetensors.torch import load_file
from tiny_checkpoints import CONFIG, gguf_writer, random_weights, weights_of, write_gguf

from paged_attn_layer import convert_checkpoint, load_model, save_model


def logits_of(directory, tokens=TEXT):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    with torch.no_grad():
        return model(torch.tensor(tokens)[None], use_cache=False).logits[0].numpy()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model_type)
def test_each_family_back_to_transformers(case, tmp_path):
    """Through orbax: there the weights have our names, so the family's table runs backwards."""
    parity = Parity(case, tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "orbax", to="orbax")
    convert_checkpoint(tmp_path / "orbax", tmp_path / "ours", max_file_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    np.testing.assert_array_equal(logits_of(tmp_path / "ours"), parity.expected)


def test_a_gguf_file_becomes_a_model_of_transformers(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, random_weights(), gguf_writer(path))
    convert_checkpoint(path, tmp_path / "new")
    tokens = [token % CONFIG["vocab_size"] for token in TEXT]
    ours = PagedRunner(load_model(path), tokens=(40,), max_seqs=1).feed(tokens, [len(tokens)])
    assert_close(ours, logits_of(tmp_path / "new", tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_live_state_dict(tmp_path, dtype):
    """Without a file between: also in bfloat16, which numpy does not have."""
    model = Parity(CASES[0], tmp_path / "a").hf.to(dtype)
    config = model.config.to_dict()
    ours = load_model(model.state_dict(), config=config)
    save_model(ours, tmp_path / "b", config=config)
    saved = load_file(tmp_path / "b" / "model.safetensors")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(saved[name], weight.float(), rtol=0, atol=0)
    model.save_pretrained(tmp_path / "c")
    want = weights_of(load_model(tmp_path / "c"))
    for path, weight in weights_of(ours).items():
        np.testing.assert_array_equal(weight, want[path])
