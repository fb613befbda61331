"""Files that say what they hold, and notice every change."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load, save

from paged_cache._src.transfer import archive
from paged_cache._src.transfer.archive import Archive

ARRAYS = {
    "brain": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
    "tiny": np.array([0.5, np.nan, -2], ml_dtypes.float8_e4m3fn),
    "whole": np.arange(4, dtype=np.int32),
    "none": np.empty((0, 5), np.int8),
}
FACTS = {"sizes": [1, 2], "name": "of it", "nested": {"deep": True}}


@pytest.fixture
def written():
    return Archive("thing", FACTS, ARRAYS)


def check(got):
    assert (got.kind, got.facts) == ("thing", FACTS)
    assert got.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (got.arrays[name].dtype, got.arrays[name].shape) == (array.dtype, array.shape)
        assert got.arrays[name].tobytes() == array.tobytes()


def test_bytes_hold_it_all(written):
    check(Archive.from_bytes(written.to_bytes(), "thing"))


def test_so_does_a_file_and_nothing_else_is_left(written, tmp_path):
    for path in (tmp_path / "kept.safetensors", str(tmp_path / "kept.safetensors")):
        written.save(path)
        check(Archive.load(path, "thing"))
    assert [path.name for path in tmp_path.iterdir()] == ["kept.safetensors"]


def test_a_file_that_cannot_be_finished_leaves_the_old_one(written, tmp_path, monkeypatch):
    path = tmp_path / "kept.safetensors"
    written.save(path)

    def fail(arrays, name):
        name.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(archive, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        Archive("thing", {}, {}).save(path)
    check(Archive.load(path, "thing"))
    assert [path.name for path in tmp_path.iterdir()] == ["kept.safetensors"]


def test_every_change_of_a_byte_is_noticed(written):
    data = written.to_bytes()
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 0x20
        with pytest.raises(
            ValueError, match=r"cannot be read|does not have its checksum|no manifest|does not have the arrays"
        ):
            Archive.from_bytes(bytes(changed), "thing")


def test_every_file_that_is_cut_short_is_refused(written, tmp_path):
    data, path = written.to_bytes(), tmp_path / "short.safetensors"
    for end in (0, 7, 100, len(data) - 1):
        with pytest.raises(
            ValueError, match=f"^{end} bytes cannot be read as safetensors .* or cut short; save it again"
        ):
            Archive.from_bytes(data[:end], "thing")
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"short\.safetensors cannot be read as safetensors"):
            Archive.load(path, "thing")


def rewritten(written, manifest=None, **arrays):
    """The file with another manifest, its checksum right, and other arrays."""
    stored = load(written.to_bytes()) | arrays
    text = json.dumps(json.loads(stored["manifest"].tobytes()) | (manifest or {})).encode()
    stored["manifest"] = np.frombuffer(text, np.uint8)
    stored["manifest.sha256"] = np.frombuffer(archive._sha256(stored["manifest"]), np.uint8)
    return save({name: array for name, array in stored.items() if array is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"manifest": {"version": 2}}, "is of version 2, but this paged-cache reads version 1; save it again, or use"),
        ({"manifest": {"kind": "other"}}, "holds a other of paged-cache, but a thing is asked for"),
        ({"manifest": {"format": "else"}}, "holds a thing of else, but a thing is asked for"),
        ({"extra": np.zeros(1, np.uint8)}, "does not have the arrays of its manifest: extra; save it again"),
        ({"whole": None}, "does not have the arrays of its manifest: whole"),
        ({"whole": np.zeros(16, np.uint8)}, "is damaged: array whole does not have its checksum; save it again"),
    ],
)
def test_what_differs_is_named(written, changes, message):
    with pytest.raises(ValueError, match=message):
        Archive.from_bytes(rewritten(written, **changes), "thing")


def test_foreign_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no manifest, so paged-cache did not write it"):
        Archive.from_bytes(save({"weight": np.zeros(3)}), "thing")
    with pytest.raises(FileNotFoundError):
        Archive.load(tmp_path / "absent", "thing")
