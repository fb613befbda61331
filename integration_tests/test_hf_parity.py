"""The real model in float32 gives Hugging Face's logits and tokens, however its prompts are cut into steps."""

import numpy as np
import pytest
from paged_runner import PagedRunner, serve_greedy
from transformers import AutoTokenizer

from paged_attn_layer.engine.config import EngineConfig
from paged_attn_layer.engine.engine import Engine

TOLERANCE = 1e-3
TIE = 1e-4
NEW_TOKENS = 32
QUESTIONS = (
    "Hi",
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "List the first 5 prime numbers, then their sum.",
    "Translate to French: The cat sleeps on the warm stone wall behind the old house.",
    "Why is the sky blue?",
    "Explain in two sentences what a page table is and why an operating system has one.",
    "A train leaves at 09:40 and arrives at 13:05. How long does it travel? Think step by step, and then give the "
    "answer in hours and minutes.",
)
TEXT = (
    "The lighthouse stood at the end of a long spit of sand, and for two hundred years its keepers had written down "
    "every ship that passed: 14,203 names in 31 ledgers, the last of them dated 7 March 1953. Nobody had read them "
    "since. When the storm of 1987 took the roof off, the books were found dry, wrapped in sailcloth, in a chest."
)


@pytest.fixture(scope="module")
def runner(model):
    return PagedRunner(model, tokens=(96,), seqs=12)


@pytest.fixture(scope="module")
def prompt(tokenizer):
    return tokenizer.encode(TEXT)[:75]


@pytest.fixture(scope="module")
def expected(hf_logits, prompt):
    return hf_logits(prompt)


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([75], id="whole"),
        pytest.param([1, 7, 17, 33, 17], id="odd-chunks"),
        pytest.param([16, 16, 15, 2, 26], id="at-page-edges"),
        pytest.param([1] * 75, id="token-by-token"),
        pytest.param([40] + [1] * 35, id="prefill-then-decode"),
    ],
)
def test_logits_of_all_rows_agree(runner, prompt, expected, chunks):
    actual = runner.feed(prompt, chunks)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def test_greedy_tokens_agree_in_one_ragged_batch(model, tokenizer, hf_logits, record_property):
    prompts = [chat_prompt(tokenizer, question) for question in QUESTIONS]
    answers, mixed = serve_greedy(PagedRunner(model, tokens=(24, 96)), prompts, NEW_TOKENS, budget=96, chunk=37)
    assert mixed >= len(prompts), "prefill and decode must have shared steps"
    ties = sum(count_ties(hf_logits, *pair) for pair in zip(prompts, answers, strict=True))
    record_property("ties", ties)
    print(f"{len(prompts)} prompts x {NEW_TOKENS} tokens, {mixed} mixed steps, {ties} ties closer than {TIE}")


def test_greedy_tokens_agree_through_the_engine(model, tokenizer, hf_logits):
    prompts = [chat_prompt(tokenizer, question) for question in QUESTIONS]
    engine = Engine(model, tokenizer=tokenizer, config=EngineConfig(max_sequence_length=128, prefill_chunk=64))
    completions = engine.generate(prompts, max_new_tokens=NEW_TOKENS, stop_token_ids=())
    for prompt, completion in zip(prompts, completions, strict=True):
        count_ties(hf_logits, prompt, completion.token_ids)


def test_the_tokenizer_is_hugging_faces(tokenizer, gguf_path):
    theirs = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, local_files_only=True)
    for text in (
        *QUESTIONS,
        TEXT,
        "naïve café\n\n\tdef f(x):\n    return x  # ünï 漢字 🙂",
        "<|im_start|>user\nhi<|im_end|>",
    ):
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text)
        assert tokenizer.decode(ids) == text
    message = [{"role": "user", "content": "Hi"}]
    ours = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert ours == theirs.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def chat_prompt(tokenizer, question: str) -> list[int]:
    message = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]


def count_ties(hf_logits, prompt: list[int], answer: list[int]) -> int:
    """Check that each token is Hugging Face's greedy choice after those before it; count the ones that are ties."""
    ties = 0
    for token, logits in zip(answer, hf_logits(prompt + answer[:-1])[len(prompt) - 1 :], strict=True):
        gap = logits.max() - logits[token]
        assert gap < TIE, f"chose {token}, {gap} below the best, {logits.argmax()}"
        ties += int(token != logits.argmax())
    return ties
