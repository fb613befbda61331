import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_decoder import dense_answer
from flax import nnx
from jax.sharding import AxisType

from paged_attn_layer import read_config
from paged_attn_layer._src.engine.compilations import COMPILE_EVENT, count_compilations
from paged_attn_layer._src.engine.config import EngineConfig
from paged_attn_layer._src.engine.engine import Engine
from paged_attn_layer._src.models.decoder import Decoder
from paged_cache import BatchShapes, CacheConfig, PagedAttentionCache, PageManager, ScheduledSequence

VOCABULARY = 61
CONFIG = EngineConfig(max_seqs=3, max_sequence_length=48, page_size=4, prefill_chunk=8)


class Letters:
    """A tokenizer whose tokens are single characters; the last id ends a text."""

    eos_token_id = VOCABULARY - 1
    chat_template = None

    def encode(self, text, *, add_special_tokens=True):
        return [ord(letter) - ord("A") for letter in text]

    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(chr(ord("A") + i) for i in token_ids)

    def apply_chat_template(self, conversation, *, add_generation_prompt, tokenize, return_dict):
        text = "".join(f"{turn['role']}^{turn['content']}^" for turn in conversation).upper()
        return self.encode(text) if tokenize else text


@pytest.fixture(scope="module")
def model():
    config = read_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
    )
    return Decoder(config, rngs=nnx.Rngs(3))


@pytest.fixture(scope="module")
def engine(model):
    engine = Engine(model, tokenizer=Letters(), config=CONFIG)
    engine.warm_up()
    return engine


def prompts(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def asked():
    return prompts(1, 37, 3, 17, 9, 2)


@pytest.fixture(scope="module")
def expected(model, asked):
    """What the equations say, in float64 and without pages."""
    return [dense_answer(model, prompt, 10) for prompt in asked]


def test_nothing_compiles_after_warm_up(engine, asked):
    before = engine.stats.compilations
    with count_compilations() as count:
        engine.generate(asked, max_new_tokens=10, arrivals=[0, 0, 2, 3, 5, 20])
    assert count.total == 0
    assert engine.stats.compilations - before == 0
    assert engine.stats.warm_up_compilations == 3 + 3 + 2  # steps, copies of up to 1, 2 and 4 pages, samplers
    assert all(engine.stats.steps_by_mode.values()), "all three modes must have run"


def test_compilations_are_counted_and_the_listener_goes_away():
    with count_compilations() as count:
        jax.jit(lambda x: x * 3)(np.ones(7))
    assert count.total == 1
    jax.monitoring.record_event_duration_secs(COMPILE_EVENT, 1.0)
    assert count.total == 1


@pytest.mark.parametrize("arrivals", [None, [0, 0, 2, 3, 5, 20], [9, 7, 5, 3, 1, 0]])
def test_greedy_text_does_not_depend_on_the_batch(engine, asked, expected, arrivals):
    batched = engine.generate(asked, max_new_tokens=10, ignore_end_tokens=True, arrivals=arrivals)
    assert [completion.token_ids for completion in batched] == expected
    assert [completion.prompt_tokens for completion in batched] == [len(prompt) for prompt in asked]


def test_preempted_requests_say_the_same(model, asked, expected):
    config = dataclasses.replace(CONFIG, num_pages=1 + 12)
    small = Engine(model, tokenizer=Letters(), config=config)
    small.warm_up()
    crowded = small.generate(asked, max_new_tokens=10, ignore_end_tokens=True)
    assert small.stats.preemptions > 0
    assert small.stats.compilations == 0
    assert [completion.token_ids for completion in crowded] == expected
    assert small.stats.peak_pages <= 12


def test_a_prompt_of_several_chunks_is_sampled_at_its_last_token(model, asked, expected):
    config = EngineConfig(max_seqs=3, max_sequence_length=48, page_size=4, prefill_chunk=40)
    whole = Engine(model, tokenizer=Letters(), config=config)
    assert [whole.generate(asked[1:2], max_new_tokens=10, ignore_end_tokens=True)[0].token_ids] == expected[
        1:2
    ]  # CONFIG's chunks are of 11 at most


def test_a_stop_string_ends_the_answer_and_frees_its_pages(engine):
    (free,) = engine.generate(["HELLO"], max_new_tokens=12, ignore_end_tokens=True)
    stop = free.text[2:5]
    (stopped,) = engine.generate(["HELLO"], max_new_tokens=12, ignore_end_tokens=True, stop=[stop])
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.find(stop)]
    assert not engine.has_work
    assert engine.pages_used == 0


def test_stop_tokens_end_the_answer(engine):
    (free,) = engine.generate(["HELLO"], max_new_tokens=12, ignore_end_tokens=True)
    end = free.token_ids[3]
    (stopped,) = engine.generate(["HELLO"], max_new_tokens=12, stop_token_ids=[end], ignore_end_tokens=True)
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert (free.finish_reason, stopped.finish_reason) == ("length", "stop")


def test_end_tokens_are_those_of_model_and_tokenizer(model):
    """Without a tokenizer those of the model. Stop tokens come beside them."""
    free = Engine(model, config=CONFIG).generate([[7]], max_new_tokens=12)[0].token_ids
    first, second = list(dict.fromkeys(free))[1:3]
    model = nnx.merge(*nnx.split(model))
    model.config = dataclasses.replace(model.config, end_token_ids=frozenset([second]))
    tokenizer = Letters()
    tokenizer.eos_token_id = first
    (known,) = Engine(model, config=CONFIG).generate([[7]], max_new_tokens=12)
    assert (known.token_ids, known.finish_reason) == (free[: free.index(second) + 1], "stop")
    both = Engine(model, tokenizer=tokenizer, config=CONFIG)
    assert both.generate([[7]], max_new_tokens=12)[0].token_ids == free[: free.index(first) + 1]
    assert both.request([7], max_new_tokens=4).stop_token_ids == {first, second}
    assert both.request([7], max_new_tokens=4, stop_token_ids=[3]).stop_token_ids == {first, second, 3}
    assert both.request([7], max_new_tokens=4, stop_token_ids=[3], ignore_end_tokens=True).stop_token_ids == {3}
    assert both.generate([[7]], max_new_tokens=12, ignore_end_tokens=True)[0].token_ids == free


def test_step_and_add_request(engine):
    request = engine.request([1, 2, 3], max_new_tokens=2, ignore_end_tokens=True)
    engine.add_request(request)
    assert engine.has_work
    assert engine.step() == []
    assert len(request.output_ids) == 1
    assert engine.step() == [request]
    assert not engine.has_work
    assert engine.step() == [], "an idle engine does nothing"


def test_an_interrupted_call_leaves_nothing_behind(engine):
    def interrupt(step, finished):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.serve([engine.request([i], max_new_tokens=4) for i in range(5)], arrivals=range(5), on_step=interrupt)
    assert not engine.has_work
    assert engine.pages_used == 0


def test_the_text_is_the_same_with_and_without_prefix_reuse(model, engine, asked):
    """In a cache for all requests, and in one so small that they are preempted."""
    start = asked[1][:10]
    alike = [start + prompt[:length] for prompt, length in zip(asked, (1, 20, 3, 6, 6, 2), strict=True)]
    configs = [dataclasses.replace(CONFIG, prefix_reuse=False), dataclasses.replace(CONFIG, num_pages=1 + 12)]
    plain, small = (Engine(model, config=config) for config in configs)
    before = len(engine.stats.steps)
    answers = []
    for each in (plain, engine, small):
        completions = each.generate(
            alike + alike[:3], max_new_tokens=10, ignore_end_tokens=True, arrivals=range(0, 36, 4)
        )
        answers.append([completion.token_ids for completion in completions])
    assert answers[0] == answers[1] == answers[2]
    assert small.stats.preemptions > 0 < small.stats.cached_tokens
    assert plain.stats.cached_tokens == 0
    assert sum(step.prefill_tokens for step in engine.stats.steps[before:]) < plain.stats.prefill_tokens / 2


def test_the_same_prompt_again_computes_only_its_last_token(engine):
    (prompt,) = prompts(19)
    before = len(engine.stats.steps)
    requests = [engine.request(prompt, max_new_tokens=6, namespace=name) for name in ("a", "a", "b")]
    first, again, apart = (engine.serve([request])[0].token_ids for request in requests)
    assert first == again == apart
    computed = [(step.prefill_tokens, step.cached_tokens) for step in engine.stats.steps[before:]]
    assert [rows for rows in computed if any(rows)] == [(11, 0), (8, 0), (1, 18), (11, 0), (8, 0)]


def test_reused_pages_give_the_same_logits(model):
    shapes, tokens = BatchShapes(tokens=(24,), max_seqs=1, pages_per_seq=5), prompts(19)[0]
    config = CacheConfig.create(None, 1, 2, 20, 4, 2, 4, num_pages=9, dtype=jnp.float32)
    cache = PagedAttentionCache.init_cache(None, None, config, None)
    manager = PageManager(9, 4, max_seqs=1, max_sequence_length=20)
    run = nnx.jit(lambda model, *arrays: model(*arrays))
    logits = []
    for reused in (0, 4):
        seq = manager.admit([*tokens, 0])  # a 20th token, so that all of the others' pages could be found
        assert manager.computed(seq) == 4 * reused
        new = tokens[4 * reused :]
        pages = manager.page_tables(seq)[0, 0]
        step = shapes.build([ScheduledSequence(pages, 19, len(new))], num_pages=9, page_size=4)
        token_ids = np.pad(np.array(new, np.int32), (0, 24 - len(new)))
        last, cache = run(model, token_ids, step.positions, cache, (step.batch,), step.last_rows)
        logits.append(last)
        manager.commit(seq, 19 - 4 * reused)
        manager.truncate(seq, 16)  # the partial page would be found too
        manager.release(seq)
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-6)


def test_steps_are_recorded(model):
    engine = Engine(model, tokenizer=Letters(), config=CONFIG)
    engine.generate(prompts(5, 4), max_new_tokens=3, ignore_end_tokens=True, arrivals=[0, 1])
    stats = engine.stats
    assert stats.steps_by_mode == {"prefill": 1, "mixed": 1, "decode": 2}
    assert [step.pages_used for step in stats.steps] == [2, 3, 4, 2]
    assert (stats.prefill_tokens, stats.decode_tokens) == (9, 4)
    assert sum(step.new_tokens for step in stats.steps) == 6
    assert stats.compilations > 0, "it was not warmed up"
    assert stats.prefill_rate > 0 < stats.decode_rate


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ([], {}, "prompts[1]: the prompt is empty"),
        ("", {}, "prompts[1]: the prompt is empty"),
        ([3, 61], {}, "prompts[1]: token 1 of the prompt is 61; it must lie in 0..60"),
        ([-1], {}, "prompts[1]: token 0 of the prompt is -1"),
        ([1] * 45, {}, "45 tokens + max_new_tokens=4 = 49 must be at most max_sequence_length=48"),
        ("HI", {"chat": True}, "no chat template"),
        (
            [{"role": "user", "content": "HI"}],
            {},
            "prompts[1]: the tokenizer has no chat template, which",
        ),
        ({"role": "user", "content": "HI"}, {}, "prompts[1]: the prompt is one message; it must be a list of messages"),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_served(engine, prompt, options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        engine.generate([[1, 2], prompt], max_new_tokens=4, **options)
    assert not engine.has_work


def test_bad_options_are_refused(engine, model):
    with pytest.raises(ValueError, match="max_new_tokens=0 must be at least 1"):
        engine.generate([[1]], max_new_tokens=0)
    with pytest.raises(ValueError, match=re.escape("arrivals has 2 entries; it must have 1, one a request")):
        engine.generate([[1]], max_new_tokens=2, arrivals=[0, 1])
    with pytest.raises(ValueError, match="max_sequence_length=65 must be at most 64, the model's longest sequence"):
        Engine(model, config=dataclasses.replace(CONFIG, max_sequence_length=65))


def test_the_longest_sequence_is_the_model_s_where_that_is_short(model, caplog):
    config = dataclasses.replace(CONFIG, max_sequence_length=None)
    assert Engine(model, config=config).config.max_sequence_length == 64
    assert caplog.messages == ["max_sequence_length is 64, the model's longest sequence"]
    model = nnx.merge(*nnx.split(model))
    model.config = dataclasses.replace(model.config, max_position_embeddings=5000)
    assert Engine(model, config=config).config.max_sequence_length == 1024
    assert len(caplog.messages) == 1


def test_one_text_is_no_list_of_prompts(engine):
    with pytest.raises(ValueError, match=re.escape("prompts='HI' is one text; it must be a list of prompts")):
        engine.generate("HI")


def test_only_rows_that_sample_get_logits(engine):
    step = engine._compute
    shape = step._shapes.all_shapes()[-1]
    batch = step._shapes.warm_up_batch(shape)
    program = step._run.lower(step._weights, step._cache, batch).as_text()
    assert f"tensor<{CONFIG.max_seqs}x{VOCABULARY}xf32>" in program
    assert f"tensor<{shape.tokens}x{VOCABULARY}x" not in program


def test_each_step_is_sent_in_one_transfer(engine, monkeypatch):
    sent, device_put = [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, *to: sent.append(jax.tree.leaves(x)) or device_put(x, *to))
    steps = len(engine.stats.steps)
    # A namespace of their own: nothing that other tests left in pages is found, so no page has to be copied.
    requests = [
        engine.request(prompt, max_new_tokens=3, ignore_end_tokens=True, namespace="sent") for prompt in prompts(11, 3)
    ]
    with jax.transfer_guard_host_to_device("disallow"):  # refuses transfers but those of device_put
        engine.serve(requests)
    assert [len(leaves) for leaves in sent] == [1] * (len(engine.stats.steps) - steps)


def test_messages_are_a_prompt(model):
    tokenizer = Letters()
    tokenizer.chat_template = "as it says"
    engine = Engine(model, tokenizer=tokenizer, config=CONFIG)
    request = engine.request([{"role": "user", "content": "HI"}, {"role": "me", "content": "YO"}], max_new_tokens=2)
    assert tokenizer.decode(request.prompt_ids, skip_special_tokens=False) == "USER^HI^ME^YO^"


def test_text_needs_a_tokenizer(model):
    engine = Engine(model, config=CONFIG)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        engine.generate(["HI"])
    with pytest.raises(ValueError, match="needs a tokenizer"):
        engine.generate([[1]], stop=["X"])
    assert engine.generate([[5]], max_new_tokens=2)[0].text == ""


@pytest.mark.parametrize("size", ["max_seqs", "page_size", "prefill_chunk", "num_pages", "max_sequence_length"])
def test_sizes_are_checked(size):
    with pytest.raises(ValueError, match=f"{size}=0 must be at least"):
        EngineConfig(**{size: 0})


def test_a_progress_bar_counts_the_answers(engine, capsys):
    engine.generate([[1, 2]], max_new_tokens=3, ignore_end_tokens=True, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_over_a_mesh_the_text_is_the_same_and_nothing_recompiles(model, asked, expected):
    mesh = jax.make_mesh((2,), ("tp",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    sharded = Engine(model, tokenizer=Letters(), config=CONFIG, mesh=mesh)
    sharded.warm_up()
    batched = sharded.generate(asked, max_new_tokens=10, ignore_end_tokens=True)
    assert [completion.token_ids for completion in batched] == expected
    assert sharded.stats.compilations == 0


def test_the_cache_is_of_the_model_s_type_or_of_another(model):
    graph, weights = nnx.split(model)
    half = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights))
    quantised = dataclasses.replace(CONFIG, kv_dtype="int8")
    engines = [Engine(half, config=config) for config in (CONFIG, quantised)]
    assert [engine._compute._cache.views[0].pages.dtype for engine in engines] == ["bfloat16", "int8"]
    assert len(engines[1].generate([[1]], max_new_tokens=3)[0].token_ids) == 3
    with pytest.raises(ValueError, match="dtype=int32 must be one of"):
        Engine(half, config=dataclasses.replace(CONFIG, kv_dtype="int32"))
