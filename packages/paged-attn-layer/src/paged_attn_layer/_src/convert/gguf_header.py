"""The header of a GGUF file: its metadata and the table of its tensors, checked before anything is used.

Format: the GGUF specification (ggml-org/ggml, docs/gguf.md). The checks are those of llama.cpp's reader
(ggml/src/gguf.cpp); with the check of the file's end, a table that does not match the file's data is found.
"""

import dataclasses
import math
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from paged_attn_layer._src.convert.lazy import Shape

_VERSIONS = (2, 3)
_MOST_VALUES = 1 << 23  # of the metadata; the largest vocabularies have about 1.5 million with their merges
_MOST_TENSORS = 1 << 16
_MOST_AXES = 4
_NUMBERS = {
    gguf.GGUFValueType.UINT8: "<u1",
    gguf.GGUFValueType.INT8: "<i1",
    gguf.GGUFValueType.UINT16: "<u2",
    gguf.GGUFValueType.INT16: "<i2",
    gguf.GGUFValueType.UINT32: "<u4",
    gguf.GGUFValueType.INT32: "<i4",
    gguf.GGUFValueType.FLOAT32: "<f4",
    gguf.GGUFValueType.BOOL: "?",
    gguf.GGUFValueType.UINT64: "<u8",
    gguf.GGUFValueType.INT64: "<i8",
    gguf.GGUFValueType.FLOAT64: "<f8",
}
"""numpy's type of each type of number."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One entry of the table: `shape` is in numpy's order, `start` is a position in the file."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: Shape
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; a row is stored in whole blocks."""
        values, size = gguf.GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // values * size

    @property
    def end(self) -> int:
        """The position after its last byte."""
        return self.start + math.prod(self.shape[:-1]) * self.row_bytes


class GGUFHeader:
    """The metadata of a file, and the table of its tensors.

    Raises:
        ValueError: the file is no GGUF file, is cut short, or its table does not match its data.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        data = np.memmap(path, mode="r")
        cursor = _Cursor(data.data)
        tensors, fields = _read_counts(cursor)
        self.fields: Mapping[str, Any] = _read_fields(cursor, fields)
        alignment = _alignment(self.fields)
        self.tensors: Mapping[str, StoredTensor] = _read_table(cursor, tensors, alignment)
        _check_end(self.tensors, len(data), alignment)

    def rows(self, tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
        """The stored bytes of some rows along the tensor's last axis.

        Only they are mapped into memory, for a file that is mapped whole counts as memory of this process.
        """
        first = tensor.start + start * tensor.row_bytes
        return np.memmap(self.path, np.uint8, "r", first, (stop - start, tensor.row_bytes))


class _Cursor:
    """Reads values in turn, and nothing past the end."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._values = 0
        self.position = 0

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self.position:
            raise ValueError(f"it ends within its header, {len(self._data)} bytes long")
        self.position += size
        return bytes(self._data[self.position - size : self.position])

    def whole(self, form: str = "<Q") -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return str(self.take(self.whole()), "utf-8")

    def value(self, kind: gguf.GGUFValueType) -> Any:
        """A number, a text or a list of them."""
        if kind == gguf.GGUFValueType.ARRAY:
            return self._list(gguf.GGUFValueType(self.whole("<I")), self.whole())
        return self.text() if kind == gguf.GGUFValueType.STRING else self._numbers(kind, 1)[0]

    def _list(self, kind: gguf.GGUFValueType, count: int) -> list[Any]:
        self._values += count
        if self._values > _MOST_VALUES:
            raise ValueError(f"its metadata has {self._values} values; at most {_MOST_VALUES} are read")
        if kind == gguf.GGUFValueType.STRING:
            return [self.text() for _ in range(count)]
        return self._numbers(kind, count)

    def _numbers(self, kind: gguf.GGUFValueType, count: int) -> list[Any]:
        if kind not in _NUMBERS:
            raise ValueError("its metadata has lists of lists")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """How many tensors and how many fields follow."""
    if cursor.take(4) != b"GGUF":
        raise ValueError('it does not start with "GGUF"')
    version = cursor.whole("<I")
    if version not in _VERSIONS:
        big = " (big-endian; llama.cpp's gguf_convert_endian.py turns it)" if version & 0xFFFF == 0 else ""
        raise ValueError(f"its version is {version}{big}, which must be one of {_VERSIONS}")
    tensors, fields = cursor.whole(), cursor.whole()
    if tensors > _MOST_TENSORS:
        raise ValueError(f"it has {tensors} tensors; at most {_MOST_TENSORS} are read")
    return tensors, fields


def _read_fields(cursor: _Cursor, count: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text()
        if key in fields:
            raise ValueError(f"it has {key} twice")
        fields[key] = cursor.value(gguf.GGUFValueType(cursor.whole("<I")))
    return fields


def _alignment(fields: Mapping[str, Any]) -> int:
    alignment = fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment={alignment!r} must be a power of two")
    return alignment


def _read_table(cursor: _Cursor, count: int, alignment: int) -> dict[str, StoredTensor]:
    """The tensors, each of which must start where the one before it ends."""
    entries = [(_read_entry(cursor), cursor.whole()) for _ in range(count)]
    first = start = _aligned(cursor.position, alignment)
    tensors: dict[str, StoredTensor] = {}
    for entry, offset in entries:
        if entry.name in tensors:
            raise ValueError(f"it has the tensor {entry.name} twice")
        if first + offset != start:
            raise ValueError(f"{entry.name} is at offset {offset}, which must be {start - first}")
        tensors[entry.name] = tensor = dataclasses.replace(entry, start=start)
        start = _aligned(tensor.end, alignment)
    return tensors


def _read_entry(cursor: _Cursor) -> StoredTensor:
    """One entry of the table, without the place of its data."""
    name, axes = cursor.text(), cursor.whole("<I")
    if not 1 <= axes <= _MOST_AXES:
        raise ValueError(f"{name} has {axes} axes; it must have 1 to {_MOST_AXES}")
    sizes = [cursor.whole() for _ in range(axes)]  # the last axis first
    kind = gguf.GGMLQuantizationType(cursor.whole("<I"))
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if 0 in sizes or sizes[0] % block:
        raise ValueError(f"{name} has {sizes[0]} values in a row, which must be a multiple of {block} for {kind.name}")
    return StoredTensor(name, kind, tuple(reversed(sizes)), 0)


def _check_end(tensors: Mapping[str, StoredTensor], size: int, alignment: int) -> None:
    """The data must end where the file does, but for padding: otherwise table and data do not belong together."""
    end = max((tensor.end for tensor in tensors.values()), default=size)
    if end > size:
        raise ValueError(f"its tensors end at byte {end}, and it has {size}")
    if size - end >= alignment:
        raise ValueError(f"it has {size - end} bytes after its last tensor; its table does not match its data")


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
