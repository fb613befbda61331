"""Mutators of a GGUF file whose lengths and counts stay right: what they make is wrong in what it says."""

import dataclasses
import random

import gguf
from gguf_bytes import KINDS, field, header, text
from tiny_checkpoints import as_llama_cpp_orders, gguf_name

_VALUES = (
    *(0, 1, 2, 3, 7, -1, -(2**31), 2**31 - 1, 2**32 - 1, 10**9, True, False, 0.0, -1.0, 1e-30, 1e30, 0.5),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "llama", b"\xff", "4.0", [], [1], [1, 2], ["a"], [0.5], [-1]),
)
"""What the value of a field is replaced by."""
_NAMES = (b"", b"x", b"\xff", b"a\x00b", b"blk.9999999999.attn_q.weight", b"rope_freqs.weight", b"\xf0\x9f\x98\x80")


@dataclasses.dataclass(frozen=True)
class Described:
    """What a file says. A field is a key, a kind and bytes; a tensor is a name, sizes, a kind, an offset."""

    fields: tuple
    tensors: tuple
    data: bytes

    @property
    def header(self) -> bytes:
        """All before the data."""
        return header(self.tensors, self.fields)

    def to_bytes(self) -> bytes:
        """The file."""
        return self.header + self.data


def described(settings, weights):
    """A right file with these fields and weights, in float32."""
    tensors, parts, offset = [], [], 0
    for name, weight in weights.items():
        content = as_llama_cpp_orders(name, weight).tobytes()
        content += bytes(-len(content) % 32)
        sizes = tuple(reversed(weight.shape))
        tensors.append((gguf_name(name), sizes, int(gguf.GGMLQuantizationType.F32), offset))
        parts.append(content)
        offset += len(content)
    fields = tuple(field(key, value) for key, value in settings.items())
    return Described(fields, tuple(tensors), b"".join(parts))


def _with(things: tuple, index: int, *others) -> tuple:
    return (*things[:index], *others, *things[index + 1 :])


def _one(rng: random.Random, things: tuple) -> tuple:
    index = rng.randrange(len(things))
    return index, things[index]


def _fields(file: Described, index: int, *others) -> bytes:
    return dataclasses.replace(file, fields=_with(file.fields, index, *others)).to_bytes()


def _tensors(file: Described, index: int, *others) -> bytes:
    return dataclasses.replace(file, tensors=_with(file.tensors, index, *others)).to_bytes()


def other_value(rng, file):
    """A field has another value, and its kind."""
    index, (key, _, _) = _one(rng, file.fields)
    return _fields(file, index, field(key, rng.choice(_VALUES)))


def other_kind(rng, file):
    """The bytes of a value are read as another kind."""
    index, (key, _, value) = _one(rng, file.fields)
    return _fields(file, index, (key, rng.choice([*KINDS, 13, 255]), value))


def long_list(rng, file):
    """A list says that it has more items than the file has bytes."""
    index, (key, _, _) = _one(rng, file.fields)
    count = rng.choice([2**22, 2**32, 2**62, 2**64 - 1])
    value = rng.choice([*KINDS]).to_bytes(4, "little") + count.to_bytes(8, "little")
    return _fields(file, index, (key, KINDS.ARRAY, value))


def nested_lists(rng, file):
    """A list of lists of lists."""
    index, (key, _, _) = _one(rng, file.fields)
    level = int(KINDS.ARRAY).to_bytes(4, "little") + (1).to_bytes(8, "little")
    return _fields(file, index, (key, KINDS.ARRAY, level * rng.choice([2, 100, 100_000])))


def missing_field(rng, file):
    """A field is not there."""
    return _fields(file, _one(rng, file.fields)[0])


def double_field(rng, file):
    """A field is there twice, with two values."""
    index, found = _one(rng, file.fields)
    return _fields(file, index, found, field(found[0], rng.choice(_VALUES)))


def other_key(rng, file):
    """A field has another key."""
    index, (key, kind, value) = _one(rng, file.fields)
    other = rng.choice([key.upper(), key + "x", "general.alignment", "llama.rope.scaling.type", b"\xff", b""])
    return _fields(file, index, (other, kind, value))


def missing_tensor(rng, file):
    """A tensor is not in the table."""
    return _tensors(file, _one(rng, file.tensors)[0])


def double_tensor(rng, file):
    """A tensor is in the table twice."""
    index, found = _one(rng, file.tensors)
    return _tensors(file, index, found, found)


def other_name(rng, file):
    """A tensor has a name that no model has, or that of another."""
    index, (_, *rest) = _one(rng, file.tensors)
    return _tensors(file, index, (rng.choice([*_NAMES, _one(rng, file.tensors)[1][0]]), *rest))


def other_sizes(rng, file):
    """A tensor has other sizes."""
    index, (name, sizes, *rest) = _one(rng, file.tensors)
    others = [
        sizes[::-1],
        (*sizes, 1),
        sizes[:-1],
        (sizes[0] * 2, *sizes[1:]),
        (0,),
        (2**63,),
        (2**32, 2**32),
        (1,) * 5,
    ]
    others = [other for other in others if other != sizes]
    return _tensors(file, index, (name, rng.choice(others), *rest))


def other_type(rng, file):
    """A tensor is of another type."""
    index, (name, sizes, _, offset) = _one(rng, file.tensors)
    return _tensors(file, index, (name, sizes, rng.choice([*range(1, 42), 255, 2**32 - 1]), offset))


def other_offset(rng, file):
    """A tensor starts elsewhere."""
    index, (*rest, offset) = _one(rng, file.tensors)
    others = [offset + 32, offset - 32, offset + 1, offset + 4, 0, -32, 2**63, 2**64 - 32, len(file.data)]
    return _tensors(file, index, (*rest, rng.choice([other for other in others if other != offset])))


def swapped_offsets(rng, file):
    """Two tensors have changed places."""
    one, other = rng.sample(range(len(file.tensors)), 2)
    tensors = list(file.tensors)
    tensors[one], tensors[other] = (
        (*tensors[one][:-1], tensors[other][-1]),
        (*tensors[other][:-1], tensors[one][-1]),
    )
    return dataclasses.replace(file, tensors=tuple(tensors)).to_bytes()


def other_counts(rng, file):
    """There are not as many tensors as the file says."""
    count = rng.choice([0, 1, len(file.tensors) - 1, len(file.tensors) + 1, 2**16, 2**32, 2**63])
    return header(file.tensors, file.fields, count=count, version=rng.choice([3, 3, 3, 0, 1, 2, 4])) + file.data


def more_data(rng, file):
    """The data is longer or shorter."""
    return file.header + rng.choice([file.data[:-1], file.data[:-32], file.data + bytes(32), b"", file.data * 2])


def foreign(rng, _):
    """It is no such file, or nothing but its start."""
    return rng.choice([b"", b"GGUF", b"GGML" + bytes(100), b"PK\x03\x04", b"GGUF\x03\x00\x00\x00" + text("x"), b"{}"])


GGUF = (
    *(other_value, other_kind, long_list, nested_lists, missing_field, double_field, other_key, missing_tensor),
    *(double_tensor, other_name, other_sizes, other_type, other_offset, swapped_offsets, other_counts, more_data),
    foreign,
)
