"""The order of rows in HBM can be undone exactly; a copy from the page table holds every block's ids."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from paged_kernels import AttentionSpec, KVLayout
from paged_kernels._src.attention.tpu import arrange
from paged_kernels._src.attention.tpu.config import Config

CONFIG = Config(
    spec=AttentionSpec(),
    tokens=21,
    kv_heads=2,
    q_per_kv=3,
    layout=KVLayout.create(64, "bfloat16"),
    page_size=16,
    pages_per_seq=200,
    q_rows=16,
    kv_pages=4,
    subblock_pages=4,
    buffers=3,
    q_dtype=jnp.dtype("float32"),
)


@pytest.mark.parametrize(("q_rows", "decode"), [(1, False), (16, False), (96, False), (4, True)])
@pytest.mark.parametrize(("head_dim", "lanes"), [(64, 128), (80, 128), (128, 128), (192, 256)])
def test_rows_come_back_in_their_order(q_rows, decode, head_dim, lanes):
    config = dataclasses.replace(CONFIG, q_rows=q_rows, decode=decode, layout=KVLayout.create(head_dim, "bfloat16"))
    q = jnp.arange(21 * 6 * head_dim, dtype=jnp.float32).reshape(21, 6, head_dim)
    blocks = arrange.arrange_q(q, config)
    assert blocks.shape == (config.q_blocks * config.operands, config.parts, config.part_rows, lanes)
    assert blocks.dtype == jnp.float32
    assert not blocks[..., head_dim:].any()  # the lanes where V may lie
    np.testing.assert_array_equal(arrange.restore_rows(blocks, config)[..., :head_dim], q)
    part, head = divmod(5, config.part_heads)
    np.testing.assert_array_equal(blocks[0, part, head * config.operand_tokens, :head_dim], q[0, 5])


@pytest.mark.parametrize(
    ("sizes", "latent", "lanes"),
    [((64, 64), False, 128), ((192, 192), False, 256), ((80, 40), False, 128), ((576, 512), True, 512)],
)
def test_the_output_is_the_lanes_that_v_has(sizes, latent, lanes):
    layout = KVLayout.create(sizes[0], "bfloat16", v_head_dim=sizes[1], latent=latent)
    config = dataclasses.replace(CONFIG, layout=layout)
    first = layout.v_start - layout.v_lanes.start
    blocks = jnp.zeros((2, 2, 48, config.out_lanes)).at[..., first : first + sizes[1]].set(1)
    assert config.out_lanes == lanes
    assert arrange.restore_output(blocks, config).shape == (21, 6, sizes[1])
    assert bool(jnp.all(arrange.restore_output(blocks, config) == 1))


@pytest.mark.parametrize("kv_pages", [1, 3, 32, 100, 128, 200])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("decode", [False, True])
def test_a_copy_of_the_table_holds_all_ids_of_any_block(kv_pages, window, decode):
    pages = {"kv_pages": 4 * kv_pages, "subblock_pages": kv_pages} if decode else {"kv_pages": kv_pages}
    config = dataclasses.replace(CONFIG, **pages, decode=decode, spec=AttentionSpec(sliding_window=window))
    page_table = np.asarray(arrange.arrange_page_table(jnp.arange(400, dtype=jnp.int32).reshape(2, 200), 1000, config))
    for first in range(0, 200, kv_pages if window is None else 1):
        ids = page_table[1, 0, first // 128 * 128 :][: config.ids_per_copy]
        assert len(ids) == config.ids_per_copy  # no id is missing at the end
        wanted = np.arange(first, min(first + kv_pages, 200)) + 200
        np.testing.assert_array_equal(ids[first % 128 :][: len(wanted)], wanted)


def test_ids_of_no_page_are_clamped():
    page_table = arrange.arrange_page_table(jnp.array([[-4, 7, 99]]), 8, dataclasses.replace(CONFIG, pages_per_seq=3))
    assert page_table[0, 0, :3].tolist() == [0, 7, 7]


@pytest.mark.parametrize(("q_rows", "shape"), [(1, (21, 1, 128)), (16, (2, 16, 128))])
def test_words_of_a_tree_lie_along_lanes(q_rows, shape):
    words = jnp.arange(21 * 3, dtype=jnp.int32).reshape(21, 3)
    blocks = arrange.arrange_tree(words, dataclasses.replace(CONFIG, q_rows=q_rows, tree_words=3))
    assert blocks.shape == shape
    assert not blocks[..., 3:].any()
    np.testing.assert_array_equal(blocks.reshape(-1, 128)[:21, :3], words)


def test_parameters_of_heads_are_to_base_2():
    values = arrange.arrange_heads(jnp.arange(6, dtype=jnp.float32), CONFIG)
    assert values.shape == (2, 8, 128)
    np.testing.assert_allclose(values[1, 2], 5 / np.log(2), rtol=1e-6)
