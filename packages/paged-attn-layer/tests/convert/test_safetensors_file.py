import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from paged_attn_layer._src.convert.lazy import LazyArray
from paged_attn_layer._src.convert.safetensors_file import DTYPES, read_header, write_file


def arrays():
    rng = np.random.default_rng(0)
    shapes = [(3, 4), (5,), (), (2, 0, 3), (2, 3, 4), (1, 1), (7,)]
    return {
        f"{kind}.ü": rng.normal(size=shape).astype(dtype)
        for (kind, dtype), shape in zip(DTYPES.items(), shapes, strict=True)
    }


def write(path, given, dtype=None):
    return list(write_file(path, {name: LazyArray.of(array) for name, array in given.items()}, dtype))


def test_what_is_written_is_read(tmp_path):
    given = arrays()
    assert write(tmp_path / "a.safetensors", given) == [array.nbytes for array in given.values()]
    header = read_header(tmp_path / "a.safetensors")
    assert list(header) == list(given)
    for name, array in given.items():
        read = header[name].lazy()
        assert (read.shape, read.dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(read.read(dtype=np.float64), array.astype(np.float64))


def test_the_library_reads_what_we_write(tmp_path):
    given = {name: array for name, array in arrays().items() if array.dtype.itemsize > 1}
    write(tmp_path / "a.safetensors", given)
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == given.keys()
    for name, array in given.items():
        assert (read[name].shape, read[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(read[name], array)


def test_we_read_what_the_library_writes(tmp_path):
    weight = np.arange(35, dtype=np.float32).reshape(5, 7)
    save_file({"x": np.ones(1, np.int8), "w": weight}, tmp_path / "a.safetensors", metadata={"format": "np"})
    read = read_header(tmp_path / "a.safetensors")["w"].lazy()
    np.testing.assert_array_equal(read.read((slice(1, 4), slice(2, 3))), weight[1:4, 2:3])


def test_cast_while_writing(tmp_path):
    write(tmp_path / "a.safetensors", {"w": np.ones((2, 3), np.float32)}, ml_dtypes.bfloat16)
    assert load_file(tmp_path / "a.safetensors")["w"].dtype == ml_dtypes.bfloat16
    with pytest.raises(ValueError, match=r"dtype=int64 cannot be written; it must be one of float64"):
        write(tmp_path / "b.safetensors", {"w": np.ones(2, np.int64)})
    with pytest.raises(FileExistsError):
        write(tmp_path / "a.safetensors", {})
