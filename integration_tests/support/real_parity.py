"""How a real model's logits and tokens are compared with those of Hugging Face's model."""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers
from paged_runner import PagedRunner

from paged_attn_layer import CausalLM, Engine, EngineConfig, Tokenizer

TIE = 1e-4
"""Tokens whose logits differ by less are equally likely: float32 decides between them."""
TEXT = pathlib.Path(__file__).parents[2] / "LICENSE"
"""A real text of more than 2,000 tokens."""
TOKENS, CHUNK = 2000, 250

Logits = Callable[[Sequence[int], transformers.Cache | None], np.ndarray]
"""From token ids, and maybe a cache of those before, to the logits `[tokens, vocab]` of Hugging Face's model."""


def logits_function(hf: transformers.PreTrainedModel) -> Logits:
    """The logits of this model."""

    def logits(token_ids: Sequence[int], cache: transformers.Cache | None = None) -> np.ndarray:
        with torch.no_grad():
            return hf(torch.tensor(token_ids)[None], past_key_values=cache).logits[0].numpy()

    return logits


def count_same(hf_logits: Logits, prompt: list[int], answer: list[int], most_gap: float = TIE) -> int:
    """Returns the number of tokens that are Hugging Face's greedy choice. Checks that the others are near ties."""
    same = 0
    for token, logits in zip(answer, hf_logits(prompt + answer[:-1])[len(prompt) - 1 :], strict=True):
        gap = logits.max() - logits[token]
        assert gap < most_gap, f"chose {token}, {gap} below the best, {logits.argmax()}"
        same += int(token == logits.argmax())
    return same


def count_ties(
    model: CausalLM, tokenizer: Tokenizer, hf_logits: Logits, prompts: Sequence[list[int]], new_tokens: int
) -> int:
    """Returns how many of our greedy tokens are not Hugging Face's. Checks that those are near ties."""
    config = EngineConfig(max_seqs=len(prompts), max_sequence_length=160, prefill_chunk=64)
    engine = Engine(model, tokenizer=tokenizer, config=config)
    completions = engine.generate(prompts, max_new_tokens=new_tokens, ignore_end_tokens=True)
    pairs = zip(prompts, completions, strict=True)
    return sum(new_tokens - count_same(hf_logits, prompt, completion.token_ids) for prompt, completion in pairs)


def divergences(model: CausalLM, tokenizer: Tokenizer, hf_logits: Logits) -> np.ndarray:
    """Returns the KL divergence, in nats, of our distribution after each token of the text from Hugging Face's."""
    token_ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:TOKENS]
    assert len(token_ids) == TOKENS
    runner = PagedRunner(model, tokens=(CHUNK,), max_seqs=1, pages_per_seq=-(-TOKENS // 16))
    cache, found = transformers.DynamicCache(), []
    for start in range(0, TOKENS, CHUNK):
        part = token_ids[start : start + CHUNK]
        found.append(_divergences(hf_logits(part, cache), runner.step({0: part})[0]))
    return np.concatenate(found)


def _divergences(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Row by row. With `p` their probabilities and `d` the differences of logits it is `sum p d + log sum p exp(-d)`.

    Small differences so give small sums, which float32 holds well.
    """
    theirs, ours = (torch.tensor(logits) for logits in (expected, actual))
    probabilities, differences = theirs.softmax(-1), theirs - ours
    mean = (probabilities * differences).sum(-1)
    return (mean + (probabilities * torch.expm1(-differences)).sum(-1).log1p()).numpy()
