"""Block sizes fit the chip. What cannot fit is refused, and the message names the memory."""

import dataclasses

import jax.numpy as jnp
import pytest

from paged_kernels import AttentionSpec, KVLayout
from paged_kernels._src.attention.tpu.config import Config
from paged_kernels._src.attention.tpu.sizes import (
    check_fits,
    preferred_block_sizes,
    q_rows_for,
    shrink_to_fit,
    smem_bytes,
    vmem_bytes,
    with_kv_pages,
)
from paged_kernels._src.tpu.chip import CHIPS


def preferred(kv_heads, q_per_kv, head_dim, page_size, dtype, decode):
    dtype = jnp.dtype(dtype)
    sizes = preferred_block_sizes(
        kv_heads=kv_heads, q_per_kv=q_per_kv, page_size=page_size, itemsize=dtype.itemsize, decode=decode
    )
    config = Config(
        spec=AttentionSpec(),
        tokens=2048,
        kv_heads=kv_heads,
        q_per_kv=q_per_kv,
        layout=KVLayout.create(head_dim, dtype),
        page_size=page_size,
        pages_per_seq=8192,
        q_rows=q_rows_for(2048, 1 if decode else None, sizes.q_rows),
        kv_pages=1,
        subblock_pages=1,
        buffers=3,
        q_dtype=dtype,
        decode=decode,
    )
    return with_kv_pages(config, sizes.kv_pages)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize(("kv_heads", "q_per_kv"), [(8, 4), (1, 8), (32, 1), (3, 3)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("decode", [True, False])
def test_defaults_fit_every_chip(chip, kv_heads, q_per_kv, head_dim, dtype, decode):
    config = shrink_to_fit(preferred(kv_heads, q_per_kv, head_dim, 16, dtype, decode), chip)
    check_fits(config, chip, tiles=1024)
    assert vmem_bytes(config) <= chip.vmem_bytes * 3 // 4


@pytest.mark.parametrize(("kv_heads", "q_per_kv", "keys"), [(1, 8, 4096), (1, 16, 4096), (1, 17, 2048), (2, 8, 2048)])
def test_one_head_has_more_keys_a_block_for_decode(kv_heads, q_per_kv, keys):
    assert preferred(kv_heads, q_per_kv, 128, 16, "bfloat16", decode=True).kv_pages * 16 == keys
    assert preferred(kv_heads, q_per_kv, 128, 16, "float32", decode=True).kv_pages * 16 == 512


def test_defaults_shrink_only_where_they_must():
    config = preferred(8, 4, 128, 16, "bfloat16", True)
    assert shrink_to_fit(config, CHIPS[3]) == config
    assert shrink_to_fit(config, CHIPS[0]).kv_pages < config.kv_pages


@pytest.mark.parametrize(
    ("tokens", "max_q_len", "q_rows", "expected"),
    [
        (64, 1, 32, 16),
        (5, 1, 32, 5),
        (64, None, 32, 32),
        (64, None, 20, 32),
        (5, None, 128, 16),
        (64, 4, 128, 16),
        (0, None, 8, 16),
    ],
)
def test_q_rows_are_what_the_kernel_can_have(tokens, max_q_len, q_rows, expected):
    assert q_rows_for(tokens, max_q_len, q_rows) == expected


@pytest.mark.parametrize("decode", [True, False])
def test_defaults_for_latent_rows_of_128_heads_fit_every_chip(decode):
    layout = KVLayout.create(576, "bfloat16", v_head_dim=512, latent=True)
    config = dataclasses.replace(preferred(1, 128, 64, 16, "bfloat16", decode), layout=layout)
    for chip in CHIPS:
        check_fits(shrink_to_fit(config, chip), chip, tiles=1024)


@pytest.mark.parametrize(
    ("page_size", "dtype", "kv_pages", "expected"),
    [
        (16, "bfloat16", 3, 3),
        (2, "bfloat16", 3, 8),  # 16 rows fill a register
        (1, "float32", 1000, 1024),
        (16, "bfloat16", 50, 64),  # two sub-blocks of whole registers of logits
        (16, "int8", 1, 8),  # a register of scales
        (24, "float32", 0, 1),
        (128, "int8", 9, 10),  # sub-blocks of two
    ],
)
def test_kv_pages_are_what_the_kernel_can_have(page_size, dtype, kv_pages, expected):
    config = preferred(1, 8, 128, page_size, "bfloat16", False)
    config = dataclasses.replace(config, layout=KVLayout.create(128, dtype))
    assert with_kv_pages(config, kv_pages).kv_pages == expected


@pytest.mark.parametrize(
    ("pages_per_seq", "kv_pages", "expected"),
    [(8192, 128, (128, 32)), (32, 128, (128, 32)), (20, 128, (96, 24)), (4, 8, (4, 4)), (4, 128, (64, 8))],
)
def test_in_decode_a_block_has_subblocks_of_several_sequences(pages_per_seq, kv_pages, expected):
    config = dataclasses.replace(preferred(1, 8, 128, 16, "bfloat16", True), pages_per_seq=pages_per_seq)
    config = with_kv_pages(config, kv_pages)
    assert (config.kv_pages, config.subblock_pages) == expected


@pytest.mark.parametrize(
    ("kv_heads", "q_per_kv", "q_rows", "expected"),
    [(8, 4, 128, 1), (8, 4, 256, 2), (1, 8, 256, 8), (1, 8, 32, 1), (1, 9, 64, 3), (1, 7, 64, 7), (2, 1, 1024, 1)],
)
def test_heads_are_split_into_operands_of_at_least_256_rows_if_they_can(kv_heads, q_per_kv, q_rows, expected):
    config = dataclasses.replace(preferred(kv_heads, q_per_kv, 128, 16, "bfloat16", False), q_rows=q_rows)
    assert (config.splits, config.parts) == (expected, kv_heads * expected)
    assert config.splits * config.part_heads == q_per_kv


def test_what_features_need_is_counted():
    plain = preferred(8, 4, 128, 16, "bfloat16", False)
    layout = KVLayout.create(128, "int8")
    whole = [
        dataclasses.replace(plain, layout=layout),
        dataclasses.replace(plain, has_alibi=True),
        dataclasses.replace(plain, has_sinks=True),
        dataclasses.replace(plain, tree_words=4),
    ]
    scales = 4 * 8 * plain.kv_pages * (plain.buffers * 128 + 2 * 16)
    keys = plain.buffers * 8 * plain.block_tokens * 256
    assert vmem_bytes(whole[0]) == vmem_bytes(plain) - keys + scales
    assert all(vmem_bytes(config) > vmem_bytes(plain) for config in whole[1:])


def test_too_much_vmem_is_refused():
    config = dataclasses.replace(preferred(8, 4, 128, 16, "bfloat16", False), kv_pages=4096)
    with pytest.raises(NotImplementedError, match=r"kv_pages=4096 need \d+ MiB of VMEM, but a v4 core has 16; lower"):
        check_fits(config, CHIPS[0], tiles=8)


def test_too_much_scalar_memory_is_refused():
    config = preferred(1, 8, 128, 16, "bfloat16", True)
    with pytest.raises(NotImplementedError, match=r"KiB of scalar memory for its 100000 tiles"):
        check_fits(config, CHIPS[3], tiles=100_000)


def test_the_page_table_takes_no_scalar_memory_in_proportion_to_its_size():
    """256 sequences of 8192 pages are 8 MB of page table. The kernel holds only a few pieces of it."""
    config = preferred(8, 4, 128, 16, "bfloat16", True)
    assert smem_bytes(config, tiles=257) == smem_bytes(dataclasses.replace(config, pages_per_seq=64), tiles=257)
