"""The engine serves any `CausalLM`: here one whose layers differ in window, heads, value size, latent rows, sharing."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from tiny_models import VOCABULARY, EveryKind, dense_answer

from paged_attn_layer import CausalLM, Engine, EngineConfig
from paged_attn_layer._src.engine.compilations import count_compilations
from paged_cache import PageMoves

CONFIG = EngineConfig(max_seqs=3, max_sequence_length=48, page_size=4, prefill_chunk=8)
NEW_TOKENS = 9


@pytest.fixture(scope="module")
def model():
    return EveryKind()


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(3)
    shared = rng.integers(0, VOCABULARY, 13).tolist()  # three pages that later requests find
    return [shared + rng.integers(0, VOCABULARY, n).tolist() for n in (20, 1, 7)] + [
        rng.integers(0, VOCABULARY, n).tolist() for n in (1, 5, 26)
    ]


@pytest.fixture(scope="module")
def expected(model, prompts):
    return [dense_answer(model, prompt, NEW_TOKENS) for prompt in prompts]


def test_it_is_a_causal_lm(model):
    assert isinstance(model, CausalLM)
    assert [(group.kind, group.layers) for group in model.cache_spec.groups] == [
        ("window", (0, 4)),
        ("full", (1,)),
        ("full", (3,)),
    ]


def test_every_kind_of_layer_gives_the_dense_model_s_tokens(model, prompts, expected):
    engine = Engine(model, config=CONFIG)
    engine.warm_up()
    for again in range(2):  # the second time from cached pages
        answers = engine.generate(prompts, max_new_tokens=NEW_TOKENS, arrivals=[0, 2, 4, 0, 1, 3])
        assert [answer.token_ids for answer in answers] == expected, f"time {again}"
    assert engine.stats.cached_tokens > 12
    assert engine.stats.compilations == 0


def test_warm_up_compiles_the_copies_that_a_step_can_need(model):
    engine = Engine(model, config=dataclasses.replace(CONFIG, num_pages=40))
    engine.warm_up()
    most = CONFIG.max_seqs * len(model.cache_spec.pool_groups())  # a page of each sequence in each group
    empty = {field.name: np.zeros(0, np.int32) for field in dataclasses.fields(PageMoves)}
    pages = np.arange(1, 1 + most, dtype=np.int32)
    moves = PageMoves(**{**empty, "copy_from": pages, "copy_to": pages + most})
    with count_compilations() as count:
        engine._compute.apply([moves])
    assert count.total == 0


def test_latent_pages_store_latent_rows_and_each_group_its_own_shape(model):
    views = Engine(model, config=CONFIG)._compute._cache.views
    latent = [view.pages for view in views if view.pages.layout.latent]
    assert [(pages.num_kv_heads, pages.head_dim, pages.v_head_dim) for pages in latent] == [(1, 24, 16)]
    shapes = sorted((view.pages.num_kv_heads, view.pages.head_dim, view.pages.v_head_dim) for view in views)
    assert (2, 16, 16) in shapes
    assert (1, 32, 16) in shapes


def test_windows_free_pages_while_a_request_runs(model):
    engine = Engine(model, config=dataclasses.replace(CONFIG, max_seqs=1))
    prompt = list(range(30))
    engine.generate([prompt], max_new_tokens=NEW_TOKENS)
    groups = model.cache_spec.pool_groups()
    windowed = sum(group.is_windowed for group in groups)
    pages = -(-(len(prompt) + NEW_TOKENS) // CONFIG.page_size)
    within_window = 1 + -(-(5 + CONFIG.prefill_chunk) // CONFIG.page_size)
    assert windowed >= 1
    assert pages * (len(groups) - windowed) < engine.stats.peak_pages
    assert engine.stats.peak_pages <= pages * (len(groups) - windowed) + within_window * windowed


def test_a_cache_with_room_for_one_request_serves_all_by_preemption(model, prompts):
    few = sum(group.most_pages(48, 11, CONFIG.page_size) for group in model.cache_spec.pool_groups())
    engine = Engine(model, config=dataclasses.replace(CONFIG, num_pages=1 + few))
    short = [prompt[:4] for prompt in prompts[:3]]  # all are admitted, and then grow
    answers = engine.generate(short, max_new_tokens=44)
    assert [answer.token_ids for answer in answers] == [dense_answer(model, prompt, 44) for prompt in short]
    assert engine.stats.preemptions


def test_over_a_mesh_the_tokens_are_the_same(model, prompts, expected):
    mesh = jax.make_mesh((2,), ("tp",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    engine = Engine(model, config=CONFIG, mesh=mesh)  # 2 KV heads are split; 1 KV head and latent rows are replicated
    answers = engine.generate(prompts[:3], max_new_tokens=NEW_TOKENS)
    assert [answer.token_ids for answer in answers] == expected[:3]
