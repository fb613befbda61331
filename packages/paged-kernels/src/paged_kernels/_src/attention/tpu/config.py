"""The static facts that one compilation of the kernel depends on, and the shapes that follow from them."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from paged_kernels._src.attention.tpu.scales import pages_per_register
from paged_kernels._src.kv_layout import KVLayout
from paged_kernels._src.spec import AttentionSpec
from paged_kernels._src.tpu.registers import LANES, SUBLANES, cdiv, round_up

Memory = Any
"""A reference in the kernel; before the call, what to allocate for it. (Pallas has no one type for both.)"""


SUBBLOCK_KEYS = 512
"""Most keys in a sub-block of a block for decode, unless a page has more."""
PARTS_AT_ONCE = 8
"""How many left operands are attended side by side, each one's products beside the softmax of the one before."""
PART_ROWS = (256, 512)
"""Least and most rows at which a left operand is cut: fewer would leave the matrix unit waiting for its other one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of one kernel. A *block* is what is attended at once: `q_rows` query rows over `kv_pages` pages."""

    spec: AttentionSpec
    tokens: int
    """Rows of q, padding included."""
    kv_heads: int
    q_per_kv: int
    """Query heads for each KV head."""
    layout: KVLayout
    page_size: int
    pages_per_seq: int
    q_rows: int
    """Rows in a block of queries: for decode any number, else 1 or a multiple of 16."""
    kv_pages: int
    """Pages in a block of keys, a multiple of `subblock_pages`."""
    subblock_pages: int
    """Pages in a sub-block of a block. In decode, the sub-blocks of a block may belong to several sequences."""
    buffers: int
    """Blocks of keys in VMEM: one in use, the others on their way."""
    q_dtype: np.dtype
    decode: bool = False
    """Whether every sequence has one row."""
    has_lse: bool = True
    """Whether the log-sum-exp is asked for."""
    has_sinks: bool = False
    has_alibi: bool = False
    tree_words: int = 0
    """Words of a row's tree mask; 0 without one."""
    reads_e4m3b11: bool = False
    """Whether the chip unpacks float8_e4m3b11fnuz, and not float8_e4m3fn."""

    @property
    def q_blocks(self) -> int:
        """Blocks of query rows."""
        return cdiv(self.tokens, self.q_rows)

    @property
    def operand_tokens(self) -> int:
        """Rows of q whose query heads are one left operand: a block's, but in decode each row meets keys of its own."""
        return 1 if self.decode else self.q_rows

    @property
    def operands(self) -> int:
        """Left operands of a KV head in a block of rows."""
        return self.q_rows // self.operand_tokens

    @property
    def splits(self) -> int:
        """Equal parts of a KV head's query heads, each a left operand of its own."""
        rows, (least, most) = self.q_per_kv * self.operand_tokens, PART_ROWS
        part_rows = min(max(least, self.kv_heads * rows // PARTS_AT_ONCE), most)
        divisors = (n for n in range(1, self.q_per_kv) if self.q_per_kv % n == 0)
        return next((n for n in divisors if rows <= n * part_rows), self.q_per_kv)

    @property
    def part_heads(self) -> int:
        """Query heads of a part."""
        return self.q_per_kv // self.splits

    @property
    def parts(self) -> int:
        """Parts of all KV heads."""
        return self.kv_heads * self.splits

    @property
    def part_rows(self) -> int:
        """Rows of the left operand for one part: its query heads times its rows of q, in whole registers."""
        return round_up(self.part_heads * self.operand_tokens, SUBLANES)

    @property
    def block_tokens(self) -> int:
        """Keys in a block."""
        return self.kv_pages * self.page_size

    @property
    def subblocks(self) -> int:
        """Equal parts of a block, attended one after the other where the block is not whole."""
        return self.kv_pages // self.subblock_pages

    @property
    def subblock_tokens(self) -> int:
        """Keys in a sub-block."""
        return self.subblock_pages * self.page_size

    @property
    def clears_unseen(self) -> bool:
        """Whether values that no row sees are zeroed in VMEM, and not each time that they are loaded."""
        return self.decode and not self.layout.is_quantised

    @property
    def q_lanes(self) -> int:
        """Lanes of q: those of the registers that hold K."""
        return self.layout.k_lanes.stop

    @property
    def out_lanes(self) -> int:
        """Lanes of the output: those of the registers that hold V."""
        return self.layout.v_lanes.stop - self.layout.v_lanes.start

    @property
    def compute_dtype(self) -> np.dtype:
        """Type of the operands of both products."""
        return self.q_dtype if self.layout.is_quantised else jnp.promote_types(self.q_dtype, self.layout.dtype)

    @property
    def head_rows(self) -> int:
        """Rows of what each query head of a part brings, in whole registers."""
        return round_up(self.part_heads, SUBLANES)

    @property
    def tree_lanes(self) -> int:
        """Words of a row's tree mask, in whole registers' widths."""
        return round_up(self.tree_words, LANES)

    @property
    def scales_shape(self) -> tuple[int, int, int]:
        """The scales of a block's pages, held in such a number that their keys fill whole registers."""
        pages = round_up(self.kv_pages, pages_per_register(self.page_size))
        return (pages, self.kv_heads, self.layout.scale_lanes(self.page_size))

    @property
    def lse_rows(self) -> int:
        """Rows of all parts and operands in one block, in whole registers' widths."""
        return round_up(self.operands * self.parts * self.part_rows, LANES)

    @property
    def ids_per_copy(self) -> int:
        """Page ids in a copy of the table for any block (in decode, any sub-block), in whole registers' widths."""
        pages = self.subblock_pages if self.decode else self.kv_pages
        # They start at multiples of `pages`, unless a window makes them start at any page.
        step = math.gcd(pages, LANES) if self.spec.sliding_window is None else 1
        return round_up(LANES - step + pages, LANES)
