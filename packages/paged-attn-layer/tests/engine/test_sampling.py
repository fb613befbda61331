"""The sampler against transformers' own processors, exact probabilities, and itself in other batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from paged_attn_layer import Decoder, Engine, EngineConfig, Request, SamplingParams, read_config
from paged_attn_layer._src.engine import sampling

VOCAB = 50
ROOM = 12
LOGITS = (3 * np.random.default_rng(0).standard_normal((3, VOCAB))).astype(np.float32)
PROMPT, ANSWER = [4, 9, 4, 30], [7, 9, 7, 7, 41]


def fields_of(*params, prompt=PROMPT, answer=ANSWER, stop_token_ids=()):
    """The fields on the device for one request with each of these params."""
    requests = []
    for each in params:
        request = Request(prompt_ids=prompt, max_new_tokens=9, sampling=each, stop_token_ids=stop_token_ids)
        request.token_ids += answer
        requests.append(request)
    rows = sampling.pack_rows(requests, len(params), ROOM)
    return sampling._fields(jnp.asarray(rows.view(np.int32).reshape(len(rows), -1)), rows.dtype)


@pytest.fixture
def transformers():
    """transformers, whose processors need torch: an oracle of these tests only. The session `integration` has it."""
    pytest.importorskip("torch", reason="torch is an oracle of these tests only, and is not installed")
    return pytest.importorskip("transformers")


def processed(processor, logits=LOGITS, tokens=None):
    import torch  # noqa: PLC0415

    tokens = [[0]] * len(logits) if tokens is None else tokens
    return processor(torch.tensor(tokens), torch.tensor(logits)).numpy()


@pytest.mark.parametrize("k", [1, 3, VOCAB - 1, VOCAB, 10**9])
def test_top_k_is_that_of_transformers(transformers, k):
    fields = fields_of(*[SamplingParams(temperature=1, top_k=k)] * 3)
    expected = processed(transformers.TopKLogitsWarper(min(k, VOCAB)))
    np.testing.assert_array_equal(sampling.truncated(jnp.asarray(LOGITS), fields), expected)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_top_p_is_that_of_transformers(transformers, p):
    fields = fields_of(*[SamplingParams(temperature=1, top_p=p)] * 3)
    expected = processed(transformers.TopPLogitsWarper(p))
    np.testing.assert_array_equal(sampling.truncated(jnp.asarray(LOGITS), fields), expected)


@pytest.mark.parametrize("p", [0.0, 0.02, 0.5, 1.0])
def test_min_p_is_that_of_transformers(transformers, p):
    fields = fields_of(*[SamplingParams(temperature=1, min_p=p)] * 3)
    expected = processed(transformers.MinPLogitsWarper(p))
    np.testing.assert_array_equal(sampling.truncated(jnp.asarray(LOGITS), fields), expected)


def test_all_three_in_transformers_order_each_row_its_own(transformers):
    asked = [(20, 0.9, 0.01), (5, 0.8, 0.1), (0, 1.0, 0.3)]
    fields = fields_of(*[SamplingParams(temperature=1, top_k=k, top_p=p, min_p=m) for k, p, m in asked])
    got = sampling.truncated(jnp.asarray(LOGITS), fields)
    for row, (k, p, m) in enumerate(asked):
        warpers = [transformers.TopKLogitsWarper(k)] if k else []
        warpers += [transformers.TopPLogitsWarper(p), transformers.MinPLogitsWarper(m)]
        expected = LOGITS[row : row + 1]
        for warper in warpers:
            expected = processed(warper, expected)
        np.testing.assert_array_equal(got[row], expected[0])


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.7])
def test_the_repetition_penalty_and_biases_are_those_of_transformers(transformers, penalty):
    bias = {9: -3.5, 7: 2.0, 0: 4.0}
    fields = fields_of(*[SamplingParams(repetition_penalty=penalty, logit_bias=bias)] * 3)
    biased = processed(transformers.SequenceBiasLogitsProcessor({(token,): b for token, b in bias.items()}))
    tokens = [PROMPT + ANSWER] * 3
    expected = processed(transformers.RepetitionPenaltyLogitsProcessor(penalty), biased, tokens)
    np.testing.assert_allclose(sampling.adjusted(jnp.asarray(LOGITS), fields), expected, rtol=1e-6)


def test_presence_and_frequency_count_the_answer_only():
    fields = fields_of(*[SamplingParams(presence_penalty=0.75, frequency_penalty=-0.5)] * 3)
    expected = LOGITS.astype(np.float64)
    for token, times in {7: 3, 9: 1, 41: 1}.items():
        expected[:, token] -= 0.75 - 0.5 * times
    np.testing.assert_allclose(sampling.adjusted(jnp.asarray(LOGITS), fields), expected, rtol=1e-6)


@pytest.mark.parametrize(("least", "excluded"), [(5, False), (6, True)])
def test_stop_tokens_wait_for_min_new_tokens_as_in_transformers(transformers, least, excluded):
    fields = fields_of(*[SamplingParams(min_new_tokens=least, logit_bias={3: 1})] * 3, stop_token_ids={3, 8})
    processor = transformers.MinNewTokensLengthLogitsProcessor(len(PROMPT), least, [3, 8])
    biased = LOGITS + np.float32(1) * (np.arange(VOCAB) == 3)
    expected = processed(processor, biased, [PROMPT + ANSWER] * 3)
    assert np.isneginf(expected[0, 3]) == excluded
    np.testing.assert_array_equal(sampling.adjusted(jnp.asarray(LOGITS), fields), expected)


def test_a_neighbour_s_penalties_leave_a_row_as_it_is():
    fields = fields_of(SamplingParams(), SamplingParams(temperature=1), SamplingParams(repetition_penalty=2))
    np.testing.assert_array_equal(sampling.adjusted(jnp.asarray(LOGITS), fields)[:2], LOGITS[:2])


@pytest.mark.parametrize(
    "asked", [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}, {"presence_penalty": 2}]
)
def test_draws_follow_the_exact_probabilities(asked):
    """Chi-square of 20,000 draws, each of another seed; the bound is passed by chance once in 1,000,000."""
    stats = pytest.importorskip("scipy.stats")
    n, logits = 20_000, np.array([1.0, 0.2, -0.5, 2.0, -1.0, 0.9, 1.5, -0.2], np.float32)
    params = dataclasses.replace(SamplingParams(temperature=1, seed=0), **asked)
    one = Request(prompt_ids=[1], max_new_tokens=4, sampling=params)
    one.token_ids += [3]
    rows = np.repeat(sampling.pack_rows([one], 1, 2), n)
    rows["seed"] = np.arange(n)
    fields = sampling._fields(jnp.asarray(rows[:1].view(np.int32).reshape(1, -1)), rows.dtype)
    exact = logits - np.where(np.arange(8) == 3, params.presence_penalty, 0)
    exact = np.asarray(sampling.truncated(jnp.asarray(exact[None] / params.temperature, jnp.float32), fields))[0]
    probabilities = np.exp(exact.astype(np.float64)) / np.exp(exact.astype(np.float64)).sum()
    words = rows.view(np.int32).reshape(n, -1)
    tokens = sampling.sample(jnp.tile(jnp.asarray(logits), (n, 1)), jnp.asarray(words), rows.dtype)
    counts = np.bincount(np.asarray(tokens), minlength=8)
    possible = probabilities > 0
    assert not counts[~possible].any()
    assert stats.chisquare(counts[possible], n * probabilities[possible]).pvalue > 1e-6


def test_draws_of_one_seed_at_successive_positions_are_independent():
    stats = pytest.importorskip("scipy.stats")
    rows = np.repeat(sampling.greedy_rows(sampling.row_type(None), 1), 4001)
    rows["temperature"], rows["seed"], rows["position"] = 1, 7, np.arange(4001)
    words = jnp.asarray(rows.view(np.int32).reshape(len(rows), -1))
    tokens = np.asarray(sampling.sample(jnp.zeros((4001, 4)), words, rows.dtype))
    pairs = np.bincount(4 * tokens[:-1] + tokens[1:], minlength=16)
    assert stats.chisquare(pairs).pvalue > 1e-6


VOCABULARY = 40
CONFIG = EngineConfig(max_seqs=3, max_sequence_length=36, page_size=4, prefill_chunk=1)
MIX = [
    SamplingParams(temperature=1, seed=1, max_new_tokens=10),
    SamplingParams(temperature=1.5, top_p=0.9, seed=2, max_new_tokens=10),
    SamplingParams(max_new_tokens=10),
    SamplingParams(temperature=0.8, top_k=5, seed=2**32 - 1, max_new_tokens=10),
    SamplingParams(temperature=2, repetition_penalty=1.5, logit_bias={3: -5}, seed=4, max_new_tokens=10),
    SamplingParams(frequency_penalty=2, max_new_tokens=10),
]
PROMPTS = [np.random.default_rng(5).integers(0, VOCABULARY, n).tolist() for n in (1, 20, 3, 17, 9, 2)]


@pytest.fixture(scope="module")
def model():
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    return Decoder(read_config(config), rngs=nnx.Rngs(3))


@pytest.fixture(scope="module")
def engine(model):
    engine = Engine(model, config=CONFIG)
    engine.warm_up()
    return engine


@pytest.fixture(scope="module")
def alone(engine):
    return [engine.generate([prompt], params)[0].token_ids for prompt, params in zip(PROMPTS, MIX, strict=True)]


def served(engine, arrivals=None):
    requests = [engine.request(prompt, params) for prompt, params in zip(PROMPTS, MIX, strict=True)]
    return [completion.token_ids for completion in engine.serve(requests, arrivals=arrivals)]


@pytest.mark.parametrize("arrivals", [None, [0, 0, 2, 3, 5, 20], [9, 7, 5, 3, 1, 0]])
def test_a_seed_gives_the_same_answer_in_every_crowd_and_nothing_compiles(engine, alone, arrivals):
    compiled = engine.stats.compilations
    assert served(engine, arrivals) == alone
    assert engine.stats.compilations == compiled == 0
    assert alone[0] != engine.generate([PROMPTS[0]], dataclasses.replace(MIX[0], seed=8))[0].token_ids


def test_a_seed_gives_the_same_answer_after_preemptions(model, alone):
    small = Engine(model, config=dataclasses.replace(CONFIG, num_pages=1 + 9))
    answers = served(small)
    assert small.stats.preemptions > 0
    assert answers == alone


def test_a_batch_without_sampling_sends_and_runs_nothing_more(engine, monkeypatch):
    monkeypatch.setattr("paged_attn_layer._src.engine.compiled_step.sample", None)
    engine.generate(PROMPTS, max_new_tokens=3)


def test_a_sampling_step_makes_explicit_transfers_only(engine, monkeypatch):
    calls, device_put = [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, *to: calls.append(x) or device_put(x, *to))
    steps = len(engine.stats.steps)
    with jax.transfer_guard_host_to_device("disallow"):  # refuses transfers but those of device_put
        engine.serve([engine.request([index], MIX[4], namespace="sent") for index in range(3)])
    assert len(calls) == len(engine.stats.steps) - steps


def test_what_an_engine_cannot_do_is_refused(engine):
    with pytest.raises(ValueError, match=r"token 0 of logit_bias is 40; it must lie in 0\.\.39"):
        engine.request([1], SamplingParams(logit_bias={VOCABULARY: 1}))
    every = SamplingParams(min_new_tokens=1, max_new_tokens=2, stop_token_ids=range(VOCABULARY))
    with pytest.raises(ValueError, match="min_new_tokens=1 needs a token that is no stop token; all are"):
        engine.request([1], every)
    with pytest.raises(ValueError, match="are 321 tokens; they must be at most 320"):
        Request(prompt_ids=[1], max_new_tokens=2, stop_token_ids=range(321), sampling=SamplingParams(min_new_tokens=1))


def test_a_seed_gives_the_same_answer_on_a_mesh_where_logits_are_split(model, alone):
    mesh = jax.make_mesh((2,), ("tp",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    sharded = Engine(model, config=CONFIG, mesh=mesh)
    sharded.warm_up()
    assert served(sharded) == alone
    assert sharded.stats.compilations == 0
