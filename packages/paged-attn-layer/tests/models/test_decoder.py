import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_checkpoints import CONFIG

from paged_attn_layer._src.blocks.rope import apply_rope
from paged_attn_layer._src.models import ModelConfig, decoder
from paged_cache import BatchShapes, CacheConfig, KVShape, PagedAttentionCache, ScheduledSequence

SHAPES = BatchShapes(tokens=(8,), max_seqs=2, pages_per_seq=4)
PAGE_SIZE, NUM_PAGES = 4, 9
TOKENS = np.random.default_rng(1).integers(0, 32, 7).astype(np.int32)


def make(**settings):
    config = ModelConfig.from_hf({**CONFIG, **settings})
    return decoder.Decoder(config, rngs=nnx.Rngs(0))


def make_cache(model, num_layers=2):
    config = CacheConfig(
        views=(KVShape(num_kv_heads=model.config.num_key_value_heads, head_dim=model.config.head_dim),) * num_layers,
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        max_sequence_length=16,
        max_seqs=2,
        dtype=jnp.float32,
    )
    return PagedAttentionCache.init_cache(None, None, config, None)


def run(model, cache, sequences, tokens, rows=None):
    step = SHAPES.build(sequences, num_pages=NUM_PAGES, page_size=PAGE_SIZE)
    ids = np.zeros(len(step.positions), np.int32)
    ids[: len(tokens)] = tokens
    rows = np.arange(len(tokens)) if rows is None else np.asarray(rows)
    return model(jnp.asarray(ids), step.positions, cache, step.batch, jnp.asarray(rows, jnp.int32))


def dense(model, tokens):
    """The equations of `ModelConfig` on whole matrices, with no pages."""
    config = model.config

    def norm(x, module):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.rms_norm_eps) * np.asarray(module.scale[...])

    def apply(x, module):
        y = x @ np.asarray(module.kernel[...])
        return y if module.bias is None else y + np.asarray(module.bias[...])

    def heads(x, module):
        return apply(x, module).reshape(len(x), -1, config.head_dim)

    positions = jnp.arange(len(tokens))
    rotate = functools.partial(apply_rope, positions=positions, config=config.rope)
    x = np.asarray(model.embed.embedding[...])[tokens]
    for index, layer in enumerate(model.layers):
        n, attention = norm(x, layer.attention_norm), layer.attention
        q, k = (np.asarray(rotate(heads(n, p))) for p in (attention.q_proj, attention.k_proj))
        group = config.num_attention_heads // config.num_key_value_heads
        k, v = (np.repeat(y, group, axis=1) for y in (k, heads(n, attention.v_proj)))
        scores = np.einsum("thd,shd->hts", q, k) * config.head_dim**-0.5
        back = np.subtract.outer(np.arange(len(tokens)), np.arange(len(tokens)))
        window = config.sliding_window(index) or len(tokens)
        weights = np.exp(np.where((back >= 0) & (back < window), scores, -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        x = x + apply(np.einsum("hts,shd->thd", weights, v).reshape(len(tokens), -1), attention.o_proj)
        n, mlp = norm(x, layer.mlp_norm), layer.mlp
        gate = apply(n, mlp.gate_proj)
        x = x + apply(gate / (1 + np.exp(-gate)) * apply(n, mlp.up_proj), mlp.down_proj)
    head = model.embed.embedding if config.tie_word_embeddings else model.lm_head
    return norm(x, model.norm) @ np.asarray(head[...]).T


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {
            "architectures": ["Qwen2ForCausalLM"],
            "use_sliding_window": True,
            "sliding_window": 3,
            "max_window_layers": 1,
        },
    ],
    ids=["llama", "tied-biases", "qwen2-window"],
)
def test_prefill_then_decode_is_the_equation(settings):
    model = make(**settings)
    cache, pages, parts = make_cache(model), [3, 1], []
    for start, end in ((0, 5), (5, 6), (6, 7)):
        part, cache = run(model, cache, [ScheduledSequence(pages, end, end - start)], TOKENS[start:end])
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts), dense(model, TOKENS), rtol=0, atol=2e-5)


def test_sequences_share_a_step_and_only_the_rows_asked_for_get_logits():
    model = make()
    sequences = [ScheduledSequence([2], 3, 3), ScheduledSequence([5], 4, 4)]
    logits, _ = run(model, make_cache(model), sequences, TOKENS, rows=[6, 2])
    want = [dense(model, TOKENS[3:])[-1], dense(model, TOKENS[:3])[-1]]
    assert logits.shape == (2, 32)
    np.testing.assert_allclose(logits, want, rtol=0, atol=2e-5)


def test_the_callers_cache_is_unchanged():
    model = make()
    cache = make_cache(model)
    _, after = run(model, cache, [ScheduledSequence([2], 3, 3)], TOKENS[:3])
    assert not np.any(cache.views[1].pages.data)
    assert np.any(after.views[1].pages.data)


def test_layers_of_one_kind_are_traced_once(monkeypatch):
    traced = []
    call = decoder.DecoderLayer.__call__
    monkeypatch.setattr(decoder.DecoderLayer, "__call__", lambda self, *args: traced.append(1) or call(self, *args))
    model = make(num_hidden_layers=5, hidden_size=24)  # sizes of no other test, so nothing is traced already
    graph, weights = nnx.split(model)
    step = SHAPES.warm_up_batch(SHAPES.all_shapes()[1])
    ids = jnp.zeros(8, jnp.int32)
    jax.jit(lambda weights, cache: nnx.merge(graph, weights)(ids, ids, cache, step.batch, ids)).lower(
        weights, make_cache(model, num_layers=5)
    )
    assert len(traced) == 1


def test_logits_are_float32_in_a_bfloat16_model():
    model = decoder.Decoder(ModelConfig.from_hf(CONFIG), param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    logits, _ = run(model, make_cache(model), [ScheduledSequence([2], 3, 3)], TOKENS[:3])
    assert logits.dtype == jnp.float32


def test_a_cache_of_another_model():
    model = make()
    with pytest.raises(ValueError, match="cache has 1 views; the model needs one for each of 2 layers"):
        run(model, make_cache(model, num_layers=1), [ScheduledSequence([2], 3, 3)], TOKENS[:3])
