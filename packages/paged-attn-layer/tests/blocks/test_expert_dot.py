import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from paged_attn_layer._src.blocks.expert_dot import blocks_of, expert_dot

dot = jax.jit(expert_dot)


def drawn(sizes, rows):
    rng = np.random.default_rng(0)
    x, matrices = rng.standard_normal((rows, 6)), rng.standard_normal((len(sizes), 6, 5))
    return x.astype(np.float32), matrices.astype(np.float32), np.array(sizes, np.int32)


@pytest.mark.parametrize(
    "sizes", [[3, 0, 5, 1], [40, 0, 0, 0], [0, 0, 0, 40], [9, 8, 7, 16], [0, 0, 0, 0], [1]], ids=str
)
def test_each_row_is_multiplied_by_the_matrix_of_its_expert(sizes):
    x, matrices, sizes = drawn(sizes, rows=40)
    want = np.einsum("ri,rio->ro", x[: sizes.sum()], np.repeat(matrices, sizes, axis=0))
    assert_allclose(dot(x, matrices, sizes)[: sizes.sum()], want, rtol=1e-5, atol=1e-5)


def test_it_is_jaxs_ragged_dot():
    x, matrices, sizes = drawn([200, 3, 0, 97], rows=300)
    assert_allclose(dot(x, matrices, sizes), jax.lax.ragged_dot(x, matrices, sizes), rtol=1e-5, atol=1e-5)


def test_the_matrix_of_an_expert_without_rows_is_not_read():
    x, matrices, sizes = drawn([3, 0, 5], rows=8)
    matrices[1] = np.nan
    assert np.isfinite(dot(x, matrices, sizes)).all()


@pytest.mark.parametrize("sizes", [[5, 0, 11, 1, 7], [24, 0, 0, 0, 0], [0, 0, 0, 0, 0]], ids=str)
def test_blocks_cover_each_row_once_and_are_of_one_expert(sizes):
    blocks = blocks_of(jnp.array(sizes, jnp.int32), rows=24, block_rows=4)
    experts = np.repeat(np.arange(5), sizes)
    count = int(blocks.count)
    ends = [*blocks.starts[1:count].tolist(), sum(sizes)][:count]
    covered = []
    for expert, start, end in zip(blocks.experts[:count], blocks.starts[:count], ends, strict=True):
        assert 0 < end - start <= 4
        assert_array_equal(experts[int(start) : end], int(expert))
        covered += range(int(start), end)
    assert covered == list(range(sum(sizes)))


def test_work_grows_with_rows_and_not_with_experts():
    few, many = (int(blocks_of(jnp.eye(experts, dtype=jnp.int32)[0] * 32, 32, 8).count) for experts in (2, 512))
    assert few == many == 4


def test_sixteen_bits_stay_sixteen_bits():
    x, matrices, sizes = drawn([3, 5], rows=8)
    assert dot(x.astype(jnp.bfloat16), matrices.astype(jnp.bfloat16), sizes).dtype == jnp.bfloat16
