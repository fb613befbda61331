"""The header of a safetensors file, and its tensors, read a few rows at a time.

Format: https://github.com/huggingface/safetensors#format. The safetensors library checks the header. The data is read
here: the library maps a whole file into memory, where a large file would count as memory of this process.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from safetensors import safe_open

from paged_attn_layer._src.convert.lazy import LazyArray, Shape
from paged_attn_layer._src.convert.source import reading

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U8": np.dtype(np.uint8),
}
"""numpy's types of the stored types that are read and written."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One entry of a header: what is stored in a file, from byte `start` on."""

    path: pathlib.Path
    kind: str
    """The type's name in the file, such as `"BF16"`."""
    shape: Shape
    start: int

    def lazy(self) -> LazyArray:
        """The tensor; its file is open only while a part is read."""
        dtype = DTYPES[self.kind]
        row = math.prod(self.shape[1:])

        def rows(start: int, stop: int) -> np.ndarray:
            position, shape = self.start + start * row * dtype.itemsize, (stop - start, *self.shape[1:])
            with reading(self.path):
                return np.memmap(self.path, dtype, "r", position, shape)

        return LazyArray.of_rows(self.shape, dtype, rows)


def read_header(path: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name.

    Raises:
        SafetensorError: the file is no safetensors file, or its end is missing.
        OSError: the file cannot be opened.
    """
    with safe_open(path, framework="numpy"):
        pass  # this checks the header, and that the tensors end where the file ends
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def write_file(path: pathlib.Path, tensors: Mapping[str, LazyArray], dtype: DTypeLike | None = None) -> Iterator[int]:
    """Writes tensors to a new file, one after the other, and yields the bytes of each when it is written.

    Args:
        path: the file.
        tensors: what is written; one of them is in memory at a time.
        dtype: the type that all are cast to; `None` keeps the type of each.

    Raises:
        ValueError: a type has no name in the format.
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + stored_bytes(tensor, dtype)
        header[name] = {
            "dtype": _kind(np.dtype(dtype or tensor.dtype)),
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            tensor.read(dtype=dtype).tofile(file)
            yield stored_bytes(tensor, dtype)


def stored_bytes(tensor: LazyArray, dtype: DTypeLike | None = None) -> int:
    """The bytes of a tensor in a file, if it is cast to a type."""
    return math.prod(tensor.shape) * np.dtype(dtype or tensor.dtype).itemsize


def _kind(dtype: np.dtype) -> str:
    """The type's name in a file."""
    for kind, other in DTYPES.items():
        if other == dtype:
            return kind
    raise ValueError(f"dtype={dtype} cannot be written; it must be one of {', '.join(map(str, DTYPES.values()))}")
