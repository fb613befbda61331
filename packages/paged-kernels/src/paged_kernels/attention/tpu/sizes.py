"""Block sizes: how much is attended at once, from the memory of the chip, and a check that it fits."""

import math

from paged_kernels.attention.tpu.config import LANES, Config, cdiv, round_up
from paged_kernels.block_sizes import BlockSizes
from paged_kernels.chip import Chip

DECODE_KEYS = 2048
"""Keys in a block for decode: large, so that the latency of a block's copies is a small part of their time."""
PREFILL_KEYS = 512
"""Keys in a block for prefill: enough to keep the matrix unit busy; more would only cost memory."""
PREFILL_OPERAND_ROWS = 256
"""Rows of a head's left operand in prefill: its query heads times the block's rows."""


def q_rows_for(tokens: int, max_q_len: int | None, q_rows: int) -> int:
    """`q_rows` as the kernel can have it: 1 for decode, else a multiple of 16, no more than the batch can fill."""
    if max_q_len == 1:
        return 1
    most = tokens if max_q_len is None else min(tokens, max_q_len)
    return round_up(min(q_rows, most), 16)


def default_block_sizes(*, group: int, bytes_per_page: int, page_size: int, decode: bool, chip: Chip) -> BlockSizes:
    """Block sizes whose buffers take at most a quarter of the chip's VMEM."""
    keys = DECODE_KEYS if decode else PREFILL_KEYS
    affordable = max(1, chip.vmem_bytes // 4 // (2 * bytes_per_page))
    kv_pages = 2 ** int(math.log2(max(1, min(keys // page_size, affordable))))
    return BlockSizes(q_rows=1 if decode else max(16, PREFILL_OPERAND_ROWS // group // 16 * 16), kv_pages=kv_pages)


def vmem_bytes(c: Config) -> int:
    """VMEM that the kernel needs, bytes: its buffers, and the values in flight in one step."""
    operand = c.kv_heads * c.rows
    kv = c.buffers * c.kv_heads * c.block_tokens * c.kv_lanes * c.kv_dtype.itemsize
    rows = 2 * operand * c.lanes * (c.compute_dtype.itemsize + c.q_dtype.itemsize)
    state = operand * (c.lanes + 2 * LANES) * 4 + 3 * c.lse_rows * LANES * 4
    in_flight = 6 * c.rows * round_up(c.block_tokens, LANES) * 4 + 2 * c.block_tokens * c.kv_lanes * 4
    return kv + rows + state + in_flight


def smem_bytes(c: Config, tiles: int) -> int:
    """Scalar memory that the kernel needs, bytes: the tiles and the page ids on their way."""
    return 4 * (7 * round_up(tiles, LANES) + round_up(c.q_blocks + 1, LANES) + 2 * c.table_chunks * LANES)


def check_fits(c: Config, chip: Chip, tiles: int) -> None:
    """Refuse what the chip's memories cannot hold.

    Raises:
        NotImplementedError: names the memory, what it has, what is needed, and what to lower.
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
