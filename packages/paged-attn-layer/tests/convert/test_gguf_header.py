import struct

import gguf
import numpy as np
import pytest
from gguf_bytes import KINDS, header, text
from tiny_checkpoints import finish, random_weights, write_gguf

from paged_attn_layer._src.convert.gguf_file import open_gguf
from paged_attn_layer._src.convert.gguf_header import GGUFHeader

TWO = (("a", (32,), 0, 0), ("b", (32,), 0, 128))
"""Two tensors of 32 float32 values each: name, sizes with the last axis first, type, offset."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def written(path, data=bytes(256), **facts):
    path.write_bytes(header(**{"tensors": TWO, **facts}) + data)
    return path


def test_tensors_and_values(path):
    writer = gguf.GGUFWriter(path, "llama")
    values = {"a.text": "ä", "a.list": ["x", "yz"], "a.numbers": [1, 2, 3], "a.flag": True, "a.float": 0.5, "a.int": -3}
    writer.add_string("a.text", values["a.text"])
    writer.add_array("a.list", values["a.list"])
    writer.add_array("a.numbers", values["a.numbers"])
    writer.add_bool("a.flag", True)
    writer.add_float32("a.float", 0.5)
    writer.add_int64("a.int", -3)
    given = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("one", given)
    writer.add_tensor("two", given + 1)
    finish(writer)
    read = GGUFHeader(path)
    assert {key: read.fields[key] for key in values} == values
    for name, weight in {"one": given, "two": given + 1}.items():
        tensor = read.tensors[name]
        assert (tensor.shape, tensor.kind) == ((3, 4), gguf.GGMLQuantizationType.F32)
        np.testing.assert_array_equal(read.rows(tensor, 0, 3).view(np.float32), weight)
        np.testing.assert_array_equal(read.rows(tensor, 1, 2).view(np.float32), weight[1:2])


def test_the_padding_after_the_last_tensor_may_be_missing(path):
    tensors = (("a", (3,), 0, 0),)
    assert list(GGUFHeader(written(path, bytes(12), tensors=tensors)).tensors) == ["a"]
    assert list(GGUFHeader(written(path, bytes(32), tensors=tensors)).tensors) == ["a"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (("b", (32,), 0, 0), "b is at offset 0, which must be 128"),  # the first tensor's
        (("b", (32,), 0, 96), "b is at offset 96"),  # overlaps the first
        (("b", (32,), 0, 130), "b is at offset 130"),  # not aligned
        (("b", (32,), 0, -128), "b is at offset 18446744073709551488"),
        (("b", (32,), 0, 2**40), "b is at offset 1099511627776"),
        (("b", (64,), 0, 128), "its tensors end at byte"),
        (("b", (2**62, 2**62), 0, 128), "its tensors end at byte"),
        (("b", (32,), 1, 128), "has 64 bytes after its last tensor; its table does not match its data"),  # float16
        (("b", (32,), 99, 128), "99 is not a valid GGMLQuantizationType"),
        (("b", (16,), 8, 128), "b has 16 values in a row, which must be a multiple of 32 for Q8_0"),
        (("b", (0,), 0, 128), "b has 0 values in a row"),
        (("b", (1, 1, 1, 1, 32), 0, 128), "b has 5 axes"),
        (("b", (), 0, 128), "b has 0 axes"),
        (("a", (32,), 0, 128), "it has the tensor a twice"),
    ],
)
def test_a_table_that_does_not_match_the_data(path, second, message):
    written(path, tensors=(TWO[0], second))
    with pytest.raises(ValueError, match=rf"model.gguf is not a readable GGUF file \(.*{message}.*download it again"):
        open_gguf(path)


def test_offsets_of_equal_tensors_changed_about(path):
    """No bytes overlap and none are left over, but each would get the other's values."""
    written(path, tensors=(("a", (32,), 0, 128), ("b", (32,), 0, 0)))
    with pytest.raises(ValueError, match="a is at offset 128, which must be 0"):
        open_gguf(path)


def test_one_tensor_fewer(path):
    """The data then seems to start earlier, so every weight would be another."""
    write_gguf(path, random_weights())
    content = bytearray(path.read_bytes())
    content[8:16] = struct.pack("<Q", struct.unpack("<Q", content[8:16])[0] - 1)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bytes after its last tensor; its table does not match its data"):
        open_gguf(path)


@pytest.mark.parametrize("kind", [KINDS.UINT8, KINDS.FLOAT64, KINDS.STRING, KINDS.ARRAY])
@pytest.mark.parametrize("count", [2**62, 2**64 - 1, 2**20])
def test_lists_that_are_longer_than_the_file(path, kind, count):
    """Refused before memory grows."""
    written(path, fields=[("a", KINDS.ARRAY, struct.pack("<IQ", kind, count))])
    with pytest.raises(ValueError, match=r"at most 8388608 are read|ends within its header|lists of lists"):
        open_gguf(path)


def test_lists_of_more_values_than_any_vocabulary_has(path):
    fields = [(key, KINDS.ARRAY, struct.pack("<IQ", KINDS.UINT8, 2**22) + bytes(2**22)) for key in "abc"]
    GGUFHeader(written(path, fields=fields[:2]))
    written(path, fields=fields)
    with pytest.raises(ValueError, match="its metadata has 12582912 values; at most 8388608 are read"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"count": 2**63}, "it has 9223372036854775808 tensors"),
        ({"count": 60}, "ends within its header|axes|valid"),
        ({"version": 1}, "its version is 1, which must be one of"),
        ({"version": 3 << 24}, "big-endian"),
        ({"fields": [("a", KINDS.STRING, struct.pack("<Q", 2**63))]}, "ends within its header"),
        ({"fields": [("a", KINDS.STRING, text("x"))] * 2}, "it has a twice"),
        ({"fields": [("a", 77, b"")]}, "77 is not a valid GGUFValueType"),
        (
            {"fields": [("general.alignment", KINDS.UINT32, struct.pack("<I", 0))]},
            "general.alignment=0 must be",
        ),
        ({"fields": [("general.alignment", KINDS.STRING, text("x"))]}, "general.alignment='x' must be a power"),
    ],
)
def test_headers_that_mean_nothing(path, facts, message):
    written(path, **facts)
    with pytest.raises(ValueError, match=message):
        open_gguf(path)


def test_another_alignment(path):
    fields = [("general.alignment", KINDS.UINT32, struct.pack("<I", 8))]
    tensors = (("a", (3,), 0, 0), ("b", (2,), 0, 16))
    assert GGUFHeader(written(path, bytes(24), tensors=tensors, fields=fields)).tensors["b"].shape == (2,)
