"""The real model in float32 gives Hugging Face's logits and tokens, for any split of its prompts into steps."""

import numpy as np
import pytest
from paged_runner import PagedRunner, serve_greedy
from quantised_cache import QuantisedCache
from real_parity import TIE, count_same, count_ties, divergences
from transformers import AutoTokenizer

TOLERANCE = 1e-3
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


@pytest.fixture
def runner(model):
    return PagedRunner(model, tokens=(96,), max_seqs=12)


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
    ],
)
def test_logits_of_all_rows_agree(runner, prompt, expected, chunks):
    actual = runner.feed(prompt, chunks)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("kv_dtype", "most_divergence", "least_agreement"),
    [("int8", 2e-3, 0.95), ("float8_e4m3fn", 1e-2, 0.85), ("float8_e5m2", 3e-2, 0.8), ("int4", 0.5, 0.5)],
)
def test_a_quantised_cache_gives_nearly_the_same_distribution(
    model, prompt, expected, kv_dtype, most_divergence, least_agreement
):
    """Teacher-forced over the prompt: KL divergence in nats, and the share of rows with the same likeliest token."""
    runner = PagedRunner(model, tokens=(48,), max_seqs=1, pages_per_seq=5, kv_dtype=kv_dtype)
    ours, theirs = (log_softmax(logits) for logits in (runner.feed(prompt, [40, 1, 1, 33]), expected))
    divergence = (np.exp(theirs) * (theirs - ours)).sum(-1).mean()
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    print(f"{kv_dtype}: divergence {divergence:.1e}, the same likeliest token in {agreement:.0%} of the rows")
    assert divergence < most_divergence
    assert agreement >= least_agreement


def test_an_int4_cache_rounds_as_hugging_faces_model_does_with_the_same_steps(model, prompt, hf_logits):
    """Both models round keys and values to multiples of `max |x| / 7`, so they agree almost as if nothing was rounded.

    They differ only after a value that lies within float32's error of the middle between two steps. Few do, so short
    prompts are compared, and most rows must agree. A scale 1 % too large gives a median error of 3.
    """
    runner = PagedRunner(model, tokens=(8,), max_seqs=8, pages_per_seq=1, kv_dtype="int4")
    errors = []
    for start in range(0, 48, 8):
        part = prompt[start : start + 8]
        errors.append(np.abs(runner.feed(part, [5, 3]) - hf_logits(part, QuantisedCache("int4"))).max(-1))
    print(f"int4: the largest errors of rows are {np.median(errors):.1e} in the median, {np.max(errors):.1e} at most")
    assert np.median(errors) < TOLERANCE


def test_greedy_answers_from_an_int8_cache_are_nearly_hugging_faces(model, tokenizer, hf_logits):
    prompts, length = [chat_prompt(tokenizer, question) for question in QUESTIONS[1:3]], NEW_TOKENS // 2
    runner = PagedRunner(model, tokens=(48,), max_seqs=2, pages_per_seq=5, kv_dtype="int8")
    answers, _ = serve_greedy(runner, prompts, length, budget=48, chunk=37)
    same = [
        count_same(hf_logits, prompt, answer, most_gap=1.0) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    print(f"{sum(same)} of {2 * length} tokens are Hugging Face's choice after those before them")
    assert sum(same) >= 0.9 * 2 * length


def test_greedy_tokens_agree_in_one_ragged_batch(model, tokenizer, hf_logits, record_property):
    prompts = [chat_prompt(tokenizer, question) for question in QUESTIONS]
    answers, mixed = serve_greedy(PagedRunner(model, tokens=(24, 96)), prompts, NEW_TOKENS, budget=96, chunk=37)
    assert mixed >= len(prompts), "prefill and decode must have shared steps"
    ties = sum(NEW_TOKENS - count_same(hf_logits, *pair) for pair in zip(prompts, answers, strict=True))
    record_property("ties", ties)
    print(f"{len(prompts)} prompts x {NEW_TOKENS} tokens, {mixed} mixed steps, {ties} ties closer than {TIE}")


def test_greedy_texts_agree_through_the_engine(model, tokenizer, hf_logits):
    prompts = [chat_prompt(tokenizer, question) for question in QUESTIONS]
    ties = count_ties(model, tokenizer, hf_logits, prompts, new_tokens=64)
    print(f"{len(prompts)} prompts x 64 tokens, {ties} ties closer than {TIE}")


def test_next_token_distributions_agree_over_a_long_text(model, tokenizer, hf_logits):
    found = divergences(model, tokenizer, hf_logits)
    print(f"KL divergence over {len(found)} tokens: {found.mean():.1e} in the mean, {found.max():.1e} at most")
    assert found.mean() < 1e-6


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


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
