"""What the TPU kernels share: the size of a register, and their types."""

import numpy as np

LANES = 128
"""The width of a vector register, in elements of 32 bits."""
SUBLANES = 8
"""The height of a vector register, in elements of 32 bits. For bfloat16 it holds twice as many rows."""
WORD_BYTES = 4
"""The bytes of a register's element. Rows of narrower types are packed into such words."""
KERNEL_DTYPES = ("float32", "bfloat16")
"""The types that the kernels compute with."""


def register_rows(dtype: np.dtype) -> int:
    """Rows of this type that fill a register."""
    return SUBLANES * WORD_BYTES // dtype.itemsize


def fills_words(rows: int, dtype: np.dtype) -> bool:
    """True if `rows` rows of this type are whole words. Copies move whole words."""
    return rows * dtype.itemsize % WORD_BYTES == 0
