"""Files that say what they hold, and notice every change."""

import os

import ml_dtypes
import numpy as np
import pytest
from resigned import VALUES, manifest_of, other_manifests, signed
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
    data = written.to_bytes()
    stored = load(signed(data, manifest_of(data) | (manifest or {}))) | arrays
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


def test_a_manifest_of_another_form_is_refused(written):
    """Whatever stands in a manifest: a ValueError, or the same archive."""
    refusals = 0
    for name, data in other_manifests(written.to_bytes()):
        try:
            got = Archive.from_bytes(data, "thing")
        except ValueError:
            refusals += 1
        else:
            assert got.arrays.keys() == ARRAYS.keys(), name
            assert all(array.tobytes() == ARRAYS[key].tobytes() for key, array in got.arrays.items()), name
    assert refusals > 10 * len(VALUES)


@pytest.mark.parametrize(
    "shape", [[2, -3], [-1, 3], [6], [True, 6], [2.0, 3], "23", [0, 2**70], [[2], [3]], 6, [1] * 70]
)
def test_a_shape_that_the_bytes_do_not_have_is_refused(written, shape):
    data = written.to_bytes()
    manifest = manifest_of(data)
    manifest["arrays"]["brain"] |= {"shape": shape, "dtype": "float32"}
    with pytest.raises(ValueError, match=r"bytes has a manifest whose array brain is float32 .* bytes do not hold"):
        Archive.from_bytes(signed(data, manifest), "thing")


@pytest.mark.parametrize(
    "dtype", ["object", "O", "S0", "U1", "i4,i4", "(1,", "{'names'", "datetime64[s]", "void", ["i4"]]
)
def test_a_type_that_no_array_has_is_refused(written, dtype):
    data = written.to_bytes()
    manifest = manifest_of(data)
    manifest["arrays"]["whole"]["dtype"] = dtype
    with pytest.raises(ValueError, match=r"whose array whole is .* bytes do not hold"):
        Archive.from_bytes(signed(data, manifest), "thing")


@pytest.mark.parametrize("dtype", [b"I8", b"BOOL", b"F8_E4M3"])
def test_arrays_that_are_not_stored_as_bytes_are_refused(written, tmp_path, dtype):
    data, path = written.to_bytes(), tmp_path / "kept.safetensors"
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    other = header.replace(b'"U8"', b'"' + dtype + b'"', 1)
    data = len(other).to_bytes(8, "little") + other + data[8 + len(header) :]
    path.write_bytes(data)
    for read, source in ((Archive.from_bytes, data), (Archive.load, path)):
        with pytest.raises(ValueError, match=r"has array \w+(\.\w+)? of .*, but paged-cache stores bytes"):
            read(source, "thing")


def test_a_link_stays_and_the_file_that_it_names_is_written(written, tmp_path):
    target, link = tmp_path / "there" / "kept.safetensors", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(target)
    written.save(link)  # whether the file is there or not
    written.save(link)
    assert link.is_symlink()
    assert not target.is_symlink()
    check(Archive.load(link, "thing"))
    assert [path.name for path in target.parent.iterdir()] == ["kept.safetensors"]


def test_what_is_no_regular_file_is_neither_written_nor_read(written, tmp_path):
    pipe, circle, null = tmp_path / "pipe", tmp_path / "circle", tmp_path / "null"
    os.mkfifo(pipe)
    circle.symlink_to(circle)
    null.symlink_to(os.devnull)
    before = sorted(tmp_path.iterdir())
    for path in (pipe, circle, null, tmp_path):
        for use in (written.save, lambda path: Archive.load(path, "thing")):
            with pytest.raises(ValueError, match=f"{path} is no regular file .* give the name of a file"):
                use(path)
    assert sorted(tmp_path.iterdir()) == before
    assert not os.path.isfile(os.devnull)
