import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_costing import timing
from tpu_costing.calls import Call


def call(function, donate=()):
    shapes = (jax.ShapeDtypeStruct((4,), jnp.float32),)
    table = np.zeros((1, 1), np.int32)
    return Call(function=function, integers=np.int32(3), page_table=table, shapes=shapes, donate=donate)


def test_a_call_is_timed():
    assert 0 < timing.time_call(call(lambda n, x: x * n.astype(x.dtype))) < 1e6


def test_a_call_that_takes_its_pages_gets_them_back():
    assert timing.time_call(call(lambda n, x: x + n.astype(x.dtype), donate=(1,))) > 0


def test_without_a_tpu_it_says_so():
    with pytest.raises(RuntimeError, match="needs an attached TPU"):
        timing.attached_chip()
