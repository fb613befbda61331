import math
import re

import jax
import numpy as np
import pytest

from paged_kernels import AttentionSpec


def test_is_hashable_and_static():
    assert hash(AttentionSpec(softmax_scale=0.5)) == hash(AttentionSpec(softmax_scale=0.5))
    assert AttentionSpec() != AttentionSpec(causal=False)
    assert jax.tree.leaves(AttentionSpec()) == []
    assert jax.jit(lambda spec: spec.resolved_scale(4))(AttentionSpec(softmax_scale=0.3)) == pytest.approx(0.3)


def test_scale_defaults_to_one_over_the_root_of_head_dim():
    assert AttentionSpec().resolved_scale(64) == 1 / 8
    assert AttentionSpec(softmax_scale=0.3).resolved_scale(64) == 0.3


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, True, "0.1", 1e39, 3.5e38, 10**40, 1e-39, 5e-324])
@pytest.mark.parametrize("name", ["softmax_scale", "soft_cap"])
def test_refuses_factors_that_mean_nothing(name, value):
    with pytest.raises(
        ValueError, match=re.escape(f"{name}={value!r} must be a positive finite Python number, or None")
    ):
        AttentionSpec(**{name: value})


@pytest.mark.parametrize("value", [3.4e38, 2**127, 1.2e-38])
def test_takes_every_factor_that_float32_holds(value):
    spec = AttentionSpec(softmax_scale=value, soft_cap=value)
    assert 0 < np.float32(spec.softmax_scale) < np.inf


@pytest.mark.parametrize("window", [0, -3, 1.0, True, "4", 2**31])
def test_refuses_windows_that_mean_nothing(window):
    with pytest.raises(ValueError, match=f"sliding_window={window!r} must be an int of at least 1"):
        AttentionSpec(sliding_window=window)


def test_refuses_a_causal_that_is_no_bool():
    with pytest.raises(ValueError, match="causal=1 must be True or False"):
        AttentionSpec(causal=1)


@pytest.mark.parametrize("option", ["sinks", "bias", "segment_ids", "window"])
def test_swallows_no_option(option):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        AttentionSpec(**{option: None})
