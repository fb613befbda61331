"""Every family gives the logits, tokens and weights of transformers' own model, however its tokens come."""

import json

import numpy as np
import pytest
import transformers
from checkpoints import torch_logits
from family_cases import CASES, TEXT
from flax import nnx
from parity import PAGE_SIZE, TOLERANCE, Parity, assert_close, changed_by
from safetensors.numpy import load_file

from paged_attn_layer import Engine, EngineConfig, load_model, save_model

NEW_TOKENS = 6


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.model_type)
def parity(request, tmp_path_factory):
    return Parity(request.param, tmp_path_factory.mktemp(request.param.model_type))


@pytest.mark.parametrize(
    "chunks", [[37], [1, 7, 17, 12], [4, 4, 8, 21], [25, *[1] * 12]], ids=["whole", "odd", "at-page-edges", "decode"]
)
def test_logits_of_one_sequence(parity, chunks):
    assert_close(parity.runner().feed(TEXT, chunks), parity.expected)


def test_logits_of_prefill_and_decode_in_one_step(parity):
    runner, other = parity.runner(), TEXT[::-1]
    first = runner.step({0: TEXT[:20]})[0]
    parts = [runner.step({0: TEXT[20 + n : 21 + n], 1: other[9 * n : 9 * n + 9]}) for n in range(3)]
    assert_close(np.concatenate([first, *(part[0] for part in parts)]), parity.expected[:23])
    assert_close(np.concatenate([part[1] for part in parts]), parity.torch_logits(other[:27]))


def test_logits_after_a_shared_prefix(parity):
    runner, other = parity.runner(), TEXT[:22] + TEXT[:5]
    runner.feed(TEXT, [37])
    logits = runner.step({1: other})[1]
    assert len(logits) < len(other), "the other sequence finds pages of the first"
    assert_close(logits, parity.torch_logits(other)[-len(logits) :])


def test_logits_after_preemption(parity):
    """The sequence loses its pages and is computed again, from those that are still there."""
    runner = parity.runner()
    runner.step({0: TEXT[:30]})
    runner.preempt(0)
    runner.step({1: TEXT[::-1]})  # takes some of them
    logits = runner.step({0: TEXT[:33]})[0]
    last = runner.step({0: TEXT[33:]})[0]
    assert_close(np.concatenate([logits, last]), parity.expected[-len(logits) - len(last) :])


def test_windows_give_pages_back(parity):
    groups = parity.model.cache_spec.pool_groups()
    runner = parity.runner()
    runner.feed(TEXT, [25, *[1] * 12])
    most = sum(group.most_pages(len(TEXT), 1, PAGE_SIZE) for group in groups)
    assert runner.pages_in_use <= most
    assert any(group.is_windowed for group in groups) == (most < len(groups) * -(-len(TEXT) // PAGE_SIZE))


def test_greedy_tokens_through_the_engine(parity):
    config = EngineConfig(max_seqs=2, max_sequence_length=48, page_size=PAGE_SIZE, prefill_chunk=1)
    prompts = [TEXT[:14], TEXT[:9] + TEXT[20:24]]
    answers = Engine(parity.model, config=config).generate(prompts, max_new_tokens=NEW_TOKENS, arrivals=[0, 9])
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = parity.torch_logits(prompt + answer.token_ids)[len(prompt) - 1 : -1]
        gap = logits.max(-1) - np.take_along_axis(logits, np.array(answer.token_ids)[:, None], -1)[:, 0]
        assert len(answer.token_ids) == NEW_TOKENS
        assert (gap < TOLERANCE * np.ptp(logits)).all(), "each token is transformers' choice, or ties with it"


def test_what_we_write_is_the_checkpoint_and_transformers_reads_it(parity, tmp_path):
    config = json.loads((parity.directory / "config.json").read_text())
    save_model(parity.model, tmp_path / "back", config=config)
    given, written = (load_file(path / "model.safetensors") for path in (parity.directory, tmp_path / "back"))
    assert written.keys() == given.keys()
    for name, array in given.items():
        np.testing.assert_array_equal(written[name], array)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    np.testing.assert_array_equal(torch_logits(hf, TEXT), parity.expected)


def test_a_live_state_dict_gives_the_same_weights(parity):
    """Its names may be others than a checkpoint's: experts are stacked, gate and up as one."""
    config = json.loads((parity.directory / "config.json").read_text())
    model = load_model(parity.hf.state_dict(), config=config)
    pairs = zip(nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(parity.model)), strict=True)
    for (path, weight), (other, expected) in pairs:
        assert path == other
        np.testing.assert_array_equal(weight[...], expected[...])


def test_every_weight_changes_the_logits(parity):
    """So a weight that our model ignored, or used otherwise, would be seen by the tests above."""
    weights = {name: weight for name, weight in parity.hf.state_dict().items() if weight.is_floating_point()}
    assert len(weights) > 20
    ignored = [name for name, weight in weights.items() if changed_by(parity, weight) < 10 * TOLERANCE]
    assert [name for name in ignored if not name.endswith(parity.case.no_effect)] == []


VARIANTS = [pytest.param(case, name, id=f"{case.model_type}-{name}") for case in CASES for name in case.variants]


@pytest.mark.parametrize(("case", "variant"), VARIANTS)
def test_variants(case, variant, tmp_path):
    """With the backend that compiles fastest: what differs between variants is the model, not its attention."""
    parity = Parity(case, tmp_path, variant, backend="reference")
    assert_close(parity.runner().feed(TEXT, [30, 7]), parity.expected)
