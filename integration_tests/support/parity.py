"""A small model of a family: transformers' own, with weights in which every part matters, and ours beside it."""

import functools

import numpy as np
import torch
import transformers
from checkpoints import torch_logits
from family_cases import TEXT, FamilyCase
from paged_runner import PagedRunner

from paged_attn_layer import load_model

TOLERANCE = 1e-4
"""The most that logits may differ, as a fraction of the spread of their row."""
PAGE_SIZE = 4
ROWS = 40
"""The rows that every step is padded to, so that each layer is compiled once."""


class Parity:
    """Both models of a case, saved by transformers and loaded by us. Made once for all tests of a family."""

    def __init__(self, case: FamilyCase, directory, variant: str | None = None, *, backend: str | None = None) -> None:
        self.case, self.directory = case, directory
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(**case.config(variant))
        self.hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        with torch.no_grad():
            for weight in self.hf.state_dict().values():
                _make_peaked(weight)
        self.hf.save_pretrained(directory)
        self.model = load_model(directory)
        for layer in self.model.layers:
            layer.attention.backend = backend

    @functools.cached_property
    def expected(self) -> np.ndarray:
        """transformers' logits of `TEXT`."""
        return self.torch_logits(TEXT)

    def torch_logits(self, token_ids: list[int]) -> np.ndarray:
        """transformers' logits of a sequence, without a cache."""
        return torch_logits(self.hf, token_ids)

    def runner(self) -> PagedRunner:
        """Our model with an empty cache of small pages."""
        return PagedRunner(self.model, tokens=(ROWS,), max_seqs=3, page_size=PAGE_SIZE, pages_per_seq=12)


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Logits agree row by row."""
    assert actual.shape == expected.shape
    spread = expected.max(-1, keepdims=True) - expected.min(-1, keepdims=True)
    error = np.abs(actual - expected) / spread
    assert error.max() < TOLERANCE, (
        f"rows differ by up to {error.max():.1e} of their spread, row {error.max(-1).argmax()}"
    )


def changed_by(parity: Parity, weight: torch.Tensor) -> float:
    """How much transformers' logits change with this weight, as a fraction of their spread."""
    before = weight.clone()
    with torch.no_grad():
        weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.abs().mean())
        changed = parity.torch_logits(TEXT)
        weight.copy_(before)
    return float(np.abs(changed - parity.expected).max() / np.ptp(parity.expected))


def _make_peaked(weight: torch.Tensor) -> None:
    """Random weights so large that attention looks at few tokens; norms, biases and sinks that are not 0 or 1."""
    if not weight.is_floating_point():
        return
    if weight.ndim < 2:
        weight.add_(0.3 * torch.randn(weight.shape))
    else:
        weight.copy_(1.5 * torch.randn(weight.shape) / weight.shape[-1] ** 0.5)
