import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_decoder import dense_logits
from flax import nnx
from tiny_checkpoints import CONFIG

from paged_attn_layer import (
    AttentionConfig,
    CausalLM,
    ClampedGLU,
    DecoderConfig,
    LatentAttentionConfig,
    LayerConfig,
    MLPConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
    RouterConfig,
    read_config,
)
from paged_attn_layer._src.blocks.attention import QueryGrowth
from paged_attn_layer._src.blocks.per_layer_input import PerLayerInputConfig
from paged_attn_layer._src.models import decoder
from paged_cache import BatchShapes, CacheConfig, PagedAttentionCache, PageManager

PAGE_SIZE, NUM_PAGES = 4, 17
TOKENS = np.random.default_rng(1).integers(0, 32, 7).astype(np.int32)


def make(backend=None, **settings):
    config = read_config({**CONFIG, **settings})
    return decoder.Decoder(config, backend=backend, rngs=nnx.Rngs(0))


class Served:
    """A model with a cache and a page manager of its own."""

    def __init__(self, model):
        spec, sizes = model.cache_spec, {"max_seqs": 2, "max_sequence_length": 16}
        self.model, groups = model, spec.pool_groups()
        config = CacheConfig.for_spec(spec, page_size=PAGE_SIZE, num_pages=NUM_PAGES, dtype=jnp.float32, **sizes)
        self.cache = PagedAttentionCache.init_cache(None, None, config, None)
        self.manager = PageManager(NUM_PAGES, PAGE_SIZE, groups=groups, **sizes)
        self.shapes = BatchShapes((8,), 2, config.pages_per_seq, len(groups))

    def logits(self, seqs, token_ids, q_lens, rows=None):
        """Of all of the step's tokens, or of these rows."""
        step = self.shapes.pack_seqs(self.manager, seqs, token_ids, q_lens=np.array(q_lens, np.int32))
        batches = tuple(step.group(index) for index in range(step.layout.groups))
        rows = np.arange(len(token_ids)) if rows is None else np.array(rows)
        logits, self.cache = self.model(step.token_ids, step.positions, self.cache, batches, rows.astype(np.int32))
        self.manager.commit(seqs, q_lens)
        return logits


WINDOWED = {
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": True,
    "sliding_window": 3,
    "max_window_layers": 1,
}


@pytest.mark.parametrize(
    "settings",
    [{}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, WINDOWED],
    ids=["llama", "tied-biases", "qwen2-window"],
)
def test_prefill_then_decode_is_the_equation(settings):
    served = Served(make(**settings))
    seq = served.manager.admit(TOKENS)
    parts = [served.logits([seq], TOKENS[start:end], [end - start]) for start, end in ((0, 5), (5, 6), (6, 7))]
    np.testing.assert_allclose(np.concatenate(parts), dense_logits(served.model, TOKENS), rtol=0, atol=2e-5)


NORM = NormConfig(eps=1e-3)
ATTENTION = AttentionConfig(hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig(theta=100.0))
MLP = MLPConfig(hidden_size=16, intermediate_size=24)


def layer(*, mlp=MLP, pre=NORM, post=None, parallel=False, **attention):
    return LayerConfig(
        attention=dataclasses.replace(ATTENTION, **attention), mlp=mlp, pre_norm=pre, post_norm=post, parallel=parallel
    )


OWN = PerLayerInputConfig(hidden_size=16, size=4, norm=NORM)
WIDE = {"head_dim": 16, "num_kv_heads": 1, "rope": RopeConfig(rotary_dim=4)}
MODELS = {
    "sandwich-offset": [
        layer(pre=NormConfig(offset=1.0), post=NormConfig(offset=1.0), soft_cap=2.0, softmax_scale=0.7)
    ],
    "post-norm-projection": [layer(pre=None, post=NORM, qk_norm=NORM, qk_norm_over="projection")],
    "parallel-layer-norm": [layer(pre=NormConfig(kind="layer"), parallel=True, rope=RopeConfig(interleaved=True))],
    "no-gate-biases": [
        layer(
            mlp=dataclasses.replace(MLP, gated=False, activation="gelu", use_bias=True),
            pre=NormConfig(kind="layer", use_bias=True),
            qkv_bias=True,
            out_bias=True,
            rope=None,
        )
    ],
    "sinks-growth": [
        layer(sinks=True, query_growth=QueryGrowth(beta=0.5, tokens=2), rope=RopeConfig(attention_factor=1.4))
    ],
    "shared-keys": [
        layer(sliding_window=3, qk_norm=NORM, v_norm=NormConfig(use_scale=False)),
        layer(**WIDE, values_are_keys=True, qk_norm=NORM, v_norm=NORM),
        layer(sliding_window=3, stores_kv=False, qk_norm=NORM),
        layer(**WIDE, stores_kv=False),
    ],
    "per-layer-inputs": [dataclasses.replace(layer(), per_layer_input=OWN, has_scalar=True)] * 2,
}
EXPERTS = {
    "gpt-oss": [
        layer(
            mlp=MoEConfig(
                router=RouterConfig(num_experts=4, experts_per_token=2, use_bias=True, renormalise=True),
                expert=dataclasses.replace(MLP, use_bias=True, activation=ClampedGLU(alpha=1.5, limit=2.0)),
            )
        )
    ],
    "deepseek": [
        LayerConfig(
            attention=LatentAttentionConfig(
                hidden_size=16,
                num_heads=4,
                q_rank=6,
                kv_rank=10,
                nope_dim=4,
                rope_dim=2,
                v_head_dim=5,
                latent_norm=NORM,
            ),
            mlp=MoEConfig(
                router=RouterConfig(
                    num_experts=4,
                    experts_per_token=2,
                    score="sigmoid",
                    use_choice_bias=True,
                    expert_groups=2,
                    group_score="two_largest",
                ),
                expert=MLP,
                shared=MLP,
            ),
            pre_norm=NORM,
        )
    ],
}
"""Layers that are compared with transformers in `integration_tests`, and block by block in `tests/blocks`."""
AROUND = {
    "sandwich-offset": {"embed_scale": 4.0, "logit_soft_cap": 3.0, "tie_word_embeddings": True},
    "parallel-layer-norm": {"logit_scale": 0.25, "final_norm": NormConfig(kind="layer")},
    "no-gate-biases": {"learned_positions": True},
    "shared-keys": {"shared_layers": ((2, 0), (3, 1))},
}


def make_of(layers, **around):
    """A model of these layers, whose norms, biases and sinks are random as well."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "max_position_embeddings": 16}
    config = DecoderConfig(
        **{**sizes, "layers": tuple(layers), "final_norm": NORM, "tie_word_embeddings": False, **around}
    )
    model, rng = decoder.Decoder(config, rngs=nnx.Rngs(0)), np.random.default_rng(2)
    for _, weight in nnx.to_flat_state(nnx.state(model)):
        weight[...] += jnp.asarray(rng.normal(0, 0.3, weight.shape), jnp.float32)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_layer_is_its_equation(name):
    served = Served(make_of(MODELS[name], **AROUND.get(name, {})))
    seq = served.manager.admit(TOKENS)
    parts = [served.logits([seq], TOKENS[start:end], [end - start]) for start, end in ((0, 5), (5, 6), (6, 7))]
    np.testing.assert_allclose(np.concatenate(parts), dense_logits(served.model, TOKENS), rtol=0, atol=5e-5)


def test_the_residual_multiplier_is_of_every_addition():
    served = Served(make_of([dataclasses.replace(layer(), residual_multiplier=0.3)]))
    logits = served.logits([served.manager.admit(TOKENS)], TOKENS, [7])
    np.testing.assert_allclose(logits, dense_logits(served.model, TOKENS), rtol=0, atol=5e-5)


def test_no_array_is_broadcast_or_promoted_silently():
    """Each model is traced under jax's strictest settings."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for name, layers in (MODELS | EXPERTS).items():
            lower(make_of(layers, **AROUND.get(name, {})))


def test_layers_that_see_the_same_keys_are_a_group_and_share_views():
    model = make(**WINDOWED, num_hidden_layers=4)
    assert isinstance(model, CausalLM)
    assert [(group.kind, group.tokens, group.layers) for group in model.cache_spec.groups] == [
        ("full", 0, (0,)),
        ("window", 3, (1, 2, 3)),
    ]
    assert len(model.cache_spec.views()) == 1
    assert [(place.group, place.view) for place in model.cache_spec.places()] == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_sequences_share_a_step_and_only_the_rows_asked_for_get_logits():
    served = Served(make())
    seqs = [served.manager.admit(TOKENS[:3]), served.manager.admit(TOKENS[3:])]
    logits = served.logits(seqs, TOKENS, [3, 4], rows=[6, 2])
    want = [dense_logits(served.model, TOKENS[3:])[-1], dense_logits(served.model, TOKENS[:3])[-1]]
    assert logits.shape == (2, 32)
    np.testing.assert_allclose(logits, want, rtol=0, atol=2e-5)


def test_the_callers_cache_is_unchanged():
    served = Served(make())
    before = served.cache
    served.logits([served.manager.admit(TOKENS[:3])], TOKENS[:3], [3])
    assert not np.any(before.views[1].pages.data)
    assert np.any(served.cache.views[1].pages.data)


def lower(model):
    """A step of the model with arguments in place of its weights and its cache."""
    served, (graph, weights) = Served(model), nnx.split(model)
    step = served.shapes.warm_up_batch(served.shapes.all_shapes()[1])

    def run(weights, cache, step):
        batches = tuple(step.group(index) for index in range(step.layout.groups))
        return nnx.merge(graph, weights)(step.token_ids, step.positions, cache, batches, step.last_rows)

    return jax.jit(run).lower(weights, served.cache, step).as_text()


def test_layers_of_one_kind_are_traced_once(monkeypatch):
    traced = []
    call = decoder.DecoderLayer.__call__
    monkeypatch.setattr(decoder.DecoderLayer, "__call__", lambda self, *args: traced.append(1) or call(self, *args))
    lower(make(num_hidden_layers=5, hidden_size=24))  # sizes of no other test, so nothing is traced already
    assert len(traced) == 1


def test_what_depends_on_the_step_alone_is_computed_once_and_not_for_each_layer():
    """The work list of `xla` needs cumulative sums. Layers are calls of one function, which has none."""
    counts = []
    for layers in (2, 6):
        main, *functions = re.split(
            r"\n  func\.func ", lower(make("xla", num_hidden_layers=layers)).split("func.func public", 1)[1]
        )
        run_layer = [text for text in functions if text.startswith("private @_run_layer")]
        assert len(run_layer) == 1
        assert main.count("call @_run_layer") == layers
        counts.append(sum(map(sums_in, [main, *functions])))
    assert counts[0] == counts[1] > 0


def sums_in(text):
    """Operations that make cumulative sums, in the lowered text of a function."""
    return text.count("reduce_window") + text.count("@cumsum") + text.count("stablehlo.scan")


def test_no_log_sum_exp_is_computed():
    assert "stablehlo.log " not in lower(make("xla"))


def test_logits_are_float32_in_a_bfloat16_model():
    served = Served(decoder.Decoder(read_config(CONFIG), param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert served.logits([served.manager.admit(TOKENS[:3])], TOKENS[:3], [3]).dtype == jnp.float32


def test_a_cache_or_batches_of_another_model():
    model, other = make(), Served(make(num_hidden_layers=1))
    step = other.shapes.warm_up_batch(other.shapes.all_shapes()[0])
    with pytest.raises(ValueError, match=r"cache has 1 views; the model needs 2 \(cache_spec.views\(\)\)"):
        model(step.token_ids, step.positions, other.cache, (step.batch,), step.last_rows)
    with pytest.raises(ValueError, match=r"batches has 2 entries; the model needs 1 \(cache_spec.pool_groups\(\)\)"):
        model(step.token_ids, step.positions, Served(model).cache, (step.batch,) * 2, step.last_rows)
