"""What the TPU kernels share: the size of a register, and the types that they take."""

import numpy as np

LANES = 128
"""Width of a vector register, in elements of 32 bits."""
SUBLANES = 8
"""Height of a vector register, in elements of 32 bits; of bfloat16 it holds twice as many rows."""
WORD_BYTES = 4
"""Bytes of an element of a register; rows of narrower types are packed in words."""
KERNEL_DTYPES = ("float32", "bfloat16")
"""The types that the kernels take."""


def register_rows(dtype: np.dtype) -> int:
    """Rows of a register of this type."""
    return SUBLANES * WORD_BYTES // dtype.itemsize


def fills_words(rows: int, dtype: np.dtype) -> bool:
    """Whether so many rows of this type are whole words, which is what copies move."""
    return rows * dtype.itemsize % WORD_BYTES == 0


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `a`."""
    return cdiv(a, multiple) * multiple
