import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from paged_attn_layer._src.blocks.norm import NormConfig
from paged_attn_layer._src.blocks.router import Router, RouterConfig

CONFIG = RouterConfig(num_experts=12, experts_per_token=3)
ROWS = np.random.default_rng(0).standard_normal((40, 7)).astype(np.float32)


def make(**changes):
    router, rng = Router(7, dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0)), np.random.default_rng(1)
    for _, weight in nnx.to_flat_state(nnx.state(router)):
        weight[...] = jnp.asarray(rng.standard_normal(weight[...].shape), jnp.float32)
    return router


def expected(router, x):
    """The experts and weights of one row, in float64, by sorting."""
    config, kernel = router.config, np.asarray(router.kernel[...], np.float64)
    if config.norm is not None:
        x = x / np.sqrt(np.mean(x.astype(np.float64) ** 2) + config.norm.eps) * np.asarray(router.norm.scale[...])
    logits = config.logit_scale * (x @ kernel) + (np.asarray(router.bias[...], np.float64) if config.use_bias else 0)
    scores = 1 / (1 + np.exp(-logits)) if config.score == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
    biased = scores + (np.asarray(router.choice_bias[...], np.float64) if config.use_choice_bias else 0)
    groups = np.array_split(np.arange(config.num_experts), config.expert_groups)
    count = 1 if config.group_score == "largest" else 2
    groups.sort(key=lambda group: -sum(sorted(biased[group])[-count:]))
    allowed = np.concatenate(groups[: config.groups_per_token])
    experts = allowed[np.argsort(-biased[allowed])][: config.experts_per_token]
    weights = scores[experts]
    own = np.asarray(router.expert_scale[...])[experts] if config.use_expert_scale else 1
    return experts, own * config.scale * (weights / weights.sum() if config.renormalise else weights)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"renormalise": True, "use_bias": True},
        {"expert_groups": 4, "groups_per_token": 2, "scale": 2.5},
        {
            "score": "sigmoid",
            "expert_groups": 4,
            "groups_per_token": 2,
            "group_score": "two_largest",
            "use_choice_bias": True,
        }
        | {"renormalise": True, "scale": 2.5},
        {"norm": NormConfig(eps=0.1), "logit_scale": 0.7, "use_expert_scale": True, "renormalise": True},
    ],
    ids=["softmax", "gpt-oss", "deepseek-v2", "deepseek-v3", "gemma4"],
)
def test_experts_and_weights_of_each_row(changes):
    router = make(**changes)
    choice = jax.jit(router.__call__)(ROWS)
    for row, x in enumerate(ROWS):
        experts, weights = expected(router, x)
        assert_array_equal(choice.experts[row], experts)
        assert_allclose(choice.weights[row], weights, rtol=1e-5)


def test_a_renormalised_softmax_is_the_softmax_over_the_chosen():
    router = make(renormalise=True)
    choice = router(ROWS)
    logits = np.take_along_axis(ROWS @ np.asarray(router.kernel[...]), np.asarray(choice.experts), axis=-1)
    assert_allclose(choice.weights, jax.nn.softmax(logits, axis=-1), rtol=1e-5)


def test_the_choice_bias_stays_float32_in_a_model_of_16_bits():
    router = Router(7, dataclasses.replace(CONFIG, use_choice_bias=True), param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert (router.kernel.dtype, router.choice_bias.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 0}, "experts_per_token=0 must be from 1 to 12"),
        ({"expert_groups": 4, "experts_per_token": 4}, "experts_per_token=4 must be from 1 to 3"),
        ({"expert_groups": 5}, "expert_groups=5 must be at least 1 and divide num_experts=12"),
        ({"expert_groups": 3, "groups_per_token": 4}, "groups_per_token=4 must be from 1 to expert_groups=3"),
        (
            {"expert_groups": 12, "group_score": "two_largest", "experts_per_token": 1},
            "expert_groups=12 must have at least two",
        ),
        ({"score": "relu"}, "score='relu' must be"),
        ({"group_score": "mean"}, "group_score='mean' must be"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(CONFIG, **changes)
