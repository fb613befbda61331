"""Block sizes: how much one step computes, limited by the chip's memory."""

import dataclasses

from paged_kernels._src.attention.block_sizes import BlockSizes
from paged_kernels._src.attention.tpu.config import SUBBLOCK_KEYS, Config
from paged_kernels._src.integers import cdiv, round_up
from paged_kernels._src.tpu.chip import Chip
from paged_kernels._src.tpu.registers import LANES, SUBLANES, register_rows

DECODE_KEYS = {2: 2048, 4: 512}
"""Keys in a block for decode, by bytes per element. Large blocks hide the latency of their copies. A product in float32
takes six passes, which the compiler unrolls, so there a larger block only adds code."""
ONE_HEAD_DECODE_KEYS = {2: 4096, 4: 512}
"""The same for one KV head with at most `ONE_HEAD_MOST_Q_PER_KV` query heads. With no other heads to compute beside,
more sub-blocks are computed side by side."""
ONE_HEAD_MOST_Q_PER_KV = 16
DECODE_ROWS = 16
"""Rows in a block of queries for decode. One copy brings all of them."""
DECODE_SUBBLOCKS = (1, 2, 4, 8)
"""The possible numbers of sub-blocks per block for decode. They divide `DECODE_ROWS`, so that no place stays empty."""
PREFILL_KEYS = (512, 1024)
"""The least and the most keys in a block for prefill."""
PREFILL_SUBBLOCK_KEYS = 256
"""The most keys in a sub-block for prefill; a larger page makes a larger sub-block. A sub-block on the causal diagonal
computes logits that are then masked, so it must not be large."""
PREFILL_LOGITS = {2: 2**21, 4: 2**20}
"""Rows of all heads times keys, in a block for prefill, by bytes per element. With fewer, the matrix unit waits too
often for the first and last product. With more, the code is too long."""
PREFILL_ROWS = 2048
"""Rows of all heads in a block for prefill."""
PREFILL_HEAD_ROWS = 512
"""The least rows of one KV head in a block for prefill. Its keys are copied once for all of them."""
PREFILL_Q_ROWS = 256
"""The most rows of q in a block for prefill. All of them compute the keys on the causal diagonal."""
BUFFERS = 4
"""Blocks of keys in VMEM: one in use, one whose copies are being started, two in flight."""
MIN_Q_ROWS = 16
"""The fewest rows in a block of queries, except for decode: the rows of a register of bfloat16."""


def q_rows_for(tokens: int, max_q_len: int | None, q_rows: int) -> int:
    """Returns `q_rows` as the kernel can use it: a multiple of 16, and no more than the batch can fill.

    Decode has its own number.
    """
    if max_q_len == 1:
        return max(1, min(DECODE_ROWS, tokens))
    most = tokens if max_q_len is None else min(tokens, max_q_len)
    return round_up(max(1, min(q_rows, most)), MIN_Q_ROWS)


def with_kv_pages(c: Config, kv_pages: int) -> Config:
    """Returns `c` with about `kv_pages` pages in a block: whole sub-blocks, which fill registers.

    A sub-block holds pages of one sequence. So does a block, except in decode.
    """
    kv_pages = max(1, min(kv_pages, c.pages_per_seq * (c.tokens if c.decode else 1)))
    subblock_keys = SUBBLOCK_KEYS if c.decode else PREFILL_SUBBLOCK_KEYS
    subblock_pages = max(1, min(subblock_keys // c.page_size, c.pages_per_seq, kv_pages))
    if c.decode:
        whole = _filling(LANES, subblock_pages, c.page_size)
        subblocks = max(n for n in DECODE_SUBBLOCKS if n == 1 or n * whole <= kv_pages)
    else:
        kv_pages = min(kv_pages, c.pages_per_seq)
        subblocks = cdiv(kv_pages, subblock_pages)
        subblock_pages = cdiv(kv_pages, subblocks)
    keys = LANES if c.layout.is_quantised or subblocks > 1 else register_rows(c.layout.storage_dtype)
    subblock_pages = _filling(keys, subblock_pages, c.page_size)
    return dataclasses.replace(c, kv_pages=subblocks * subblock_pages, subblock_pages=subblock_pages)


def _filling(keys: int, pages: int, page_size: int) -> int:
    """The smallest number of pages, at least `pages`, whose keys are a multiple of `keys`."""
    return round_up(pages, 1 if keys % page_size else keys // page_size)


def preferred_block_sizes(*, kv_heads: int, q_per_kv: int, page_size: int, itemsize: int, decode: bool) -> BlockSizes:
    """Returns the fastest block sizes, without regard to memory."""
    if decode:
        alone = kv_heads == 1 and q_per_kv <= ONE_HEAD_MOST_Q_PER_KV
        keys = (ONE_HEAD_DECODE_KEYS if alone else DECODE_KEYS)[itemsize]
        return BlockSizes(q_rows=DECODE_ROWS, kv_pages=max(1, keys // page_size))
    q_rows = max(PREFILL_HEAD_ROWS // q_per_kv, PREFILL_ROWS // (kv_heads * q_per_kv))
    q_rows = max(MIN_Q_ROWS, min(q_rows, PREFILL_Q_ROWS))
    least, most = PREFILL_KEYS
    keys = min(max(least, PREFILL_LOGITS[itemsize] // (kv_heads * q_per_kv * q_rows)), most)
    return BlockSizes(q_rows=q_rows, kv_pages=max(1, keys // page_size))


def shrink_to_fit(c: Config, chip: Chip) -> Config:
    """Returns `c` with its blocks halved, the larger one first, until it needs at most 3/4 of the chip's VMEM."""
    while vmem_bytes(c) > chip.vmem_bytes * 3 // 4:
        smaller = with_kv_pages(c, c.kv_pages // 2)
        if smaller.kv_pages < c.kv_pages and (_kv_bytes(c) >= _row_bytes(c) or c.q_rows <= MIN_Q_ROWS):
            c = smaller
        elif c.q_rows > 1:  # one row always fits, but is slow: each row copies its own keys
            c = dataclasses.replace(c, q_rows=round_up(c.q_rows // 2, MIN_Q_ROWS) if c.q_rows > MIN_Q_ROWS else 1)
        else:
            break
    return c


def vmem_bytes(c: Config) -> int:
    """VMEM that the kernel needs, in bytes: its buffers, and the values in use during one step."""
    logits = 6 + c.has_alibi
    in_flight = logits * c.part_rows * round_up(c.block_tokens, LANES) * 4 + 2 * c.block_tokens * c.layout.lanes * 4
    return _kv_bytes(c) + _row_bytes(c) + in_flight


def _kv_bytes(c: Config) -> int:
    keys = c.buffers * c.kv_heads * c.block_tokens * c.layout.storage_lanes * c.layout.storage_dtype.itemsize
    if not c.layout.is_quantised:
        return keys
    pages, kv_heads, lanes = c.scales_shape
    return keys + 4 * kv_heads * pages * (c.buffers * lanes + c.layout.scales_per_entry * c.page_size)


def _row_bytes(c: Config) -> int:
    operands = 2 * c.operands + c.decode
    copies = operands * (c.q_lanes * c.compute_dtype.itemsize + c.out_lanes * c.q_dtype.itemsize)
    state = (c.out_lanes + 2 * LANES) * 4
    tree = operands * round_up(c.operand_tokens, SUBLANES) * c.tree_lanes * 4
    heads = (c.has_sinks + c.has_alibi) * c.parts * c.head_rows * LANES * 4
    lse = (c.lse_rows * (LANES + 2) + c.decode * c.parts * c.part_rows * LANES) * 4
    return c.parts * c.part_rows * (copies + state) + lse + tree + heads


def smem_bytes(c: Config, tiles: int) -> int:
    """Scalar memory that the kernel needs, in bytes: the tiles, and the page ids in flight."""
    blocks = (1 + c.decode) * round_up(c.q_blocks + 1, LANES)
    subblocks = c.subblocks if c.decode else 1
    return 4 * (9 * round_up(tiles, LANES) + blocks + 3 * subblocks * c.ids_per_copy + 32 * subblocks)


def check_fits(c: Config, chip: Chip, tiles: int) -> None:
    """Raise an error if the kernel does not fit the chip's memories.

    Raises:
        NotImplementedError: it does not fit. The message names the memory, its size, the need, and what to lower.
    """
    need, have = vmem_bytes(c), chip.vmem_bytes
    if need > have:
        raise NotImplementedError(
            f"block_sizes with q_rows={c.q_rows} and kv_pages={c.kv_pages} need {cdiv(need, 2**20)} MiB of VMEM, but a "
            f"{chip.name} core has {have // 2**20}; lower them, for example BlockSizes(q_rows=16, kv_pages=4)"
        )
    need, have = smem_bytes(c, tiles), chip.smem_bytes * 3 // 4
    if need > have:
        raise NotImplementedError(
            f"a batch of {c.tokens} rows needs {need // 1024} KiB of scalar memory for its {tiles} tiles, but a "
            f"{chip.name} core has {have // 1024}; use fewer rows or sequences a call, or raise q_rows={c.q_rows}"
        )
