"""The static facts of one compiled kernel, and the shapes that follow from them."""

import dataclasses
import math
from typing import Any

import numpy as np

from paged_kernels._src.attention.tpu.scales import pages_per_register
from paged_kernels._src.integers import cdiv, round_up
from paged_kernels._src.kv_layout import KVLayout
from paged_kernels._src.spec import AttentionSpec
from paged_kernels._src.tpu.registers import LANES, SUBLANES

Memory = Any
"""Inside the kernel: a reference. Before the call: the memory to allocate. (Pallas has no common type for both.)"""


SUBBLOCK_KEYS = 512
"""The most keys in a sub-block of decode. A larger page makes a larger sub-block."""
PARTS_AT_ONCE = 8
"""The most parts that are computed together: the products of one run beside the softmax of the one before."""
PART_ROWS = (256, 512)
"""The least and the most rows at which a left operand is split. With fewer rows the matrix unit waits for keys."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The sizes of one kernel. A *block* is what one step computes: `q_rows` query rows with `kv_pages` pages."""

    spec: AttentionSpec
    tokens: int
    """The rows of q, padding included."""
    kv_heads: int
    q_per_kv: int
    """Query heads per KV head."""
    layout: KVLayout
    page_size: int
    pages_per_seq: int
    q_rows: int
    """Rows in a block of queries: any number for decode, otherwise 1 or a multiple of 16."""
    kv_pages: int
    """Pages in a block of keys, a multiple of `subblock_pages`."""
    subblock_pages: int
    """Pages in a sub-block. In decode, the sub-blocks of one block may belong to several sequences."""
    buffers: int
    """The number of blocks of keys in VMEM: one in use, the others in flight."""
    q_dtype: np.dtype
    decode: bool = False
    """True if every sequence has at most one row."""
    has_lse: bool = True
    """True if the log-sum-exp is an output."""
    has_sinks: bool = False
    has_alibi: bool = False
    tree_words: int = 0
    """The 32-bit words in each row of the tree mask; 0 without a tree mask."""
    reads_e4m3b11: bool = False
    """True if the chip unpacks float8_e4m3b11fnuz instead of float8_e4m3fn."""

    @property
    def q_blocks(self) -> int:
        """The number of blocks of query rows."""
        return cdiv(self.tokens, self.q_rows)

    @property
    def operand_tokens(self) -> int:
        """Query rows (tokens) in one left operand.

        That is a whole block. In decode it is one row, because each row has its own keys.
        """
        return 1 if self.decode else self.q_rows

    @property
    def operands(self) -> int:
        """Left operands per KV head in one block of rows."""
        return self.q_rows // self.operand_tokens

    @property
    def splits(self) -> int:
        """The number of equal parts into which the query heads of one KV head are split.

        Each part is one left operand.
        """
        rows, (least, most) = self.q_per_kv * self.operand_tokens, PART_ROWS
        part_rows = min(max(least, self.kv_heads * rows // PARTS_AT_ONCE), most)
        divisors = (n for n in range(1, self.q_per_kv) if self.q_per_kv % n == 0)
        return next((n for n in divisors if rows <= n * part_rows), self.q_per_kv)

    @property
    def part_heads(self) -> int:
        """Query heads in a part."""
        return self.q_per_kv // self.splits

    @property
    def parts(self) -> int:
        """The number of parts of all KV heads."""
        return self.kv_heads * self.splits

    @property
    def part_rows(self) -> int:
        """Rows of a part's left operand: its query heads times its tokens, rounded up to whole registers."""
        return round_up(self.part_heads * self.operand_tokens, SUBLANES)

    @property
    def block_tokens(self) -> int:
        """Keys in a block."""
        return self.kv_pages * self.page_size

    @property
    def subblocks(self) -> int:
        """Sub-blocks in a block. A block that is not full is computed one sub-block at a time."""
        return self.kv_pages // self.subblock_pages

    @property
    def subblock_tokens(self) -> int:
        """Keys in a sub-block."""
        return self.subblock_pages * self.page_size

    @property
    def clears_unseen(self) -> bool:
        """True if unseen values are set to zero once in VMEM. Otherwise they are masked at each load."""
        return self.decode and not self.layout.is_quantised

    @property
    def q_lanes(self) -> int:
        """Lanes of q: the registers that hold K."""
        return self.layout.k_lanes.stop

    @property
    def out_lanes(self) -> int:
        """Lanes of the output: the registers that hold V."""
        return self.layout.v_lanes.stop - self.layout.v_lanes.start

    @property
    def compute_dtype(self) -> np.dtype:
        """The type of the operands of both products."""
        return self.q_dtype if self.layout.is_quantised else np.promote_types(self.q_dtype, self.layout.storage_dtype)

    @property
    def head_rows(self) -> int:
        """Rows that hold one value per query head of a part, rounded up to whole registers."""
        return round_up(self.part_heads, SUBLANES)

    @property
    def tree_lanes(self) -> int:
        """The words of a row's tree mask, rounded up to whole registers."""
        return round_up(self.tree_words, LANES)

    @property
    def scales_shape(self) -> tuple[int, int, int]:
        """The shape of a block's scales. Pages are rounded up so that their keys fill whole registers."""
        pages = round_up(self.kv_pages, pages_per_register(self.page_size))
        return (pages, self.kv_heads, self.layout.scale_lanes(self.page_size))

    @property
    def lse_rows(self) -> int:
        """Rows of all parts and operands in one block, rounded up to a multiple of 128."""
        return round_up(self.operands * self.parts * self.part_rows, LANES)

    @property
    def ids_per_copy(self) -> int:
        """Page ids in one copy from the page table, enough for any block (in decode: any sub-block)."""
        pages = self.subblock_pages if self.decode else self.kv_pages
        # A copy starts at a multiple of 128. A block starts at a multiple of `pages`; with a window, at any page.
        stride = math.gcd(pages, LANES) if self.spec.sliding_window is None else 1
        return round_up(LANES - stride + pages, LANES)
