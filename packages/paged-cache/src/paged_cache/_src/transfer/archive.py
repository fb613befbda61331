"""A safetensors file of arrays and facts, with checksums that detect any changed byte."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save, save_file

FORMAT = "paged-cache"
VERSION = 1
MANIFEST = "manifest"
DIGEST = "manifest.sha256"
DTYPES = {
    name: jnp.dtype(name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
        *("int32", "int8", "int4", "uint32", "uint8"),
    )
}
"""The types that an archive's arrays may have."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """Named arrays, and facts that the reader compares with its own cache.

    Arrays are stored as bytes, because safetensors has no numpy type for bfloat16 and 8-bit floats. A manifest
    describes them. It is JSON, stored in an array of its own with its sha256 in another:

        {"format": "paged-cache", "kind": ..., "version": 1, "facts": {...},
         "arrays": {name: {"dtype": ..., "shape": [...], "sha256": ...}}}

    The checksums detect damaged and truncated files. They do not protect against someone who can write the file. So
    the reader takes nothing on trust that it can compare: a manifest that is not of this form is a ValueError.
    """

    kind: str
    """What the file holds: `"sequence"` or `"prefix cache"`."""
    facts: dict[str, Any]
    """JSON values: numbers, text, lists and dictionaries."""
    arrays: dict[str, np.ndarray]

    def to_bytes(self) -> bytes:
        """The bytes of the file."""
        return save(self._stored())

    def save(self, path: str | Path) -> None:
        """Write the file. It is written under another name and then renamed, so `path` is never half written.

        A symbolic link stays, and the file that it names is written.

        Raises:
            ValueError: `path` is a device, a pipe, a directory or something else that is no regular file.
        """
        target = _regular_file(path)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            save_file(self._stored(), unfinished)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def from_bytes(cls, data: bytes, kind: str) -> Self:
        """Read the result of `to_bytes`.

        Raises:
            ValueError: it is damaged, or not an archive of this kind; says what differs.
        """
        source = f"{len(data)} bytes"
        try:
            parts = dict(deserialize(data))
        except SafetensorError as error:
            raise _unreadable(source, error) from error
        _check_stored({name: part["dtype"] for name, part in parts.items()}, source)
        return cls._checked({name: np.frombuffer(part["data"], np.uint8) for name, part in parts.items()}, kind, source)

    @classmethod
    def load(cls, path: str | Path, kind: str) -> Self:
        """Read a file that `save` wrote.

        Raises:
            ValueError: it is damaged, or not an archive of this kind, or no regular file; says what differs.
            FileNotFoundError: there is no such file.
        """
        source = str(path)
        try:
            with safe_open(_regular_file(path), "np") as file:
                names = file.keys()
                _check_stored({name: file.get_slice(name).get_dtype() for name in names}, source)
                stored = {name: array.reshape(-1) for name, array in file.get_tensors().items()}
        except SafetensorError as error:
            raise _unreadable(source, error) from error
        return cls._checked(stored, kind, source)

    def require(self, facts: Iterable[str], arrays: Iterable[str]) -> None:
        """Check that the archive has these facts and no others, and at least these arrays.

        Raises:
            ValueError: a fact or an array is missing, or there is an unknown fact.
        """
        wrong = sorted(self.facts.keys() ^ set(facts)) + sorted(set(arrays) - self.arrays.keys())
        if wrong:
            raise ValueError(
                f"the archive of a {self.kind} does not have the facts {', '.join(facts)} and the arrays "
                f"{', '.join(arrays)}: missing or unknown are {', '.join(wrong)}; save it again"
            )

    def _stored(self) -> dict[str, np.ndarray]:
        stored = {name: _as_bytes(array) for name, array in self.arrays.items()}
        described = {
            name: {"dtype": array.dtype.name, "shape": array.shape, "sha256": _sha256(stored[name]).hex()}
            for name, array in self.arrays.items()
        }
        manifest = {"format": FORMAT, "kind": self.kind, "version": VERSION, "facts": self.facts, "arrays": described}
        text = np.frombuffer(json.dumps(manifest, sort_keys=True).encode(), np.uint8)
        return stored | {MANIFEST: text, DIGEST: np.frombuffer(_sha256(text), np.uint8)}

    @classmethod
    def _checked(cls, stored: dict[str, np.ndarray], kind: str, source: str) -> Self:
        manifest = _manifest(stored, kind, source)
        described = manifest["arrays"]
        if described.keys() != stored.keys() - {MANIFEST, DIGEST}:
            differing = sorted(described.keys() ^ (stored.keys() - {MANIFEST, DIGEST}))
            raise ValueError(
                f"{source} does not have the arrays of its manifest: {', '.join(differing)}; save it again"
            )
        arrays = {name: _array(name, entry, stored[name], source) for name, entry in described.items()}
        return cls(kind, manifest["facts"], arrays)


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """The boundary around what is done with a file's content: each error names the file.

    Raises:
        ValueError: the content is wrong.
    """
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def _manifest(stored: dict[str, np.ndarray], kind: str, source: str) -> dict[str, Any]:
    if _sha256(stored[MANIFEST]) != stored[DIGEST].tobytes():
        raise ValueError(f"{source} is damaged: the manifest does not have its checksum; save it again")
    try:
        manifest = json.loads(stored[MANIFEST].tobytes())
    except (ValueError, RecursionError) as error:
        raise _malformed(source, f"that is not JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise _malformed(source, "that is not an object")
    if manifest.get("format") != FORMAT or manifest.get("kind") != kind:
        raise ValueError(
            f"{source} holds a {manifest.get('kind')} of {manifest.get('format')}, but a {kind} is asked for; give a "
            "file of one"
        )
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{source} is of version {manifest.get('version')}, but this paged-cache reads version {VERSION}; "
            "save it again, or use the paged-cache that wrote it"
        )
    for name in ("facts", "arrays"):
        if not isinstance(manifest.get(name), dict):
            raise _malformed(source, f"whose {name} are not an object")
    return manifest


def _array(name: str, entry: Any, stored: np.ndarray, source: str) -> np.ndarray:
    """The array that is stored as these bytes, as the manifest's entry describes it."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "sha256"}:
        raise _malformed(source, f"whose array {name} does not have a dtype, a shape and a sha256")
    if _sha256(stored).hex() != entry["sha256"]:
        raise ValueError(f"{source} is damaged: array {name} does not have its checksum; save it again")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    shape = entry["shape"]
    if dtype is None or not _is_shape(shape) or math.prod(shape) * dtype.itemsize != stored.size:
        raise _malformed(
            source, f"whose array {name} is {entry['dtype']} {shape}, which {stored.size} bytes do not hold"
        )
    return stored.view(dtype).reshape(shape)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**31 for n in shape)


def _check_stored(types: dict[str, str], source: str) -> None:
    """Check that a manifest is there, and that all arrays are stored as bytes."""
    if not {MANIFEST, DIGEST} <= types.keys():
        raise ValueError(f"{source} has no manifest, so paged-cache did not write it; give a file that it wrote")
    for name, dtype in types.items():
        if dtype != "U8":
            raise ValueError(
                f"{source} has array {name} of {dtype}, but paged-cache stores bytes (U8), so it did not write it; "
                "give a file that it wrote"
            )


def _regular_file(path: str | Path) -> Path:
    """The file that `path` names, behind any symbolic links; it need not exist.

    Raises:
        ValueError: there is something else than a regular file.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise ValueError(
            f"{path} is no regular file (it is a directory, a device, a pipe or links in a circle); give the name of "
            "a file"
        )
    return target


def _as_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _sha256(array: np.ndarray) -> bytes:
    return hashlib.sha256(array.data).digest()


def _unreadable(source: str, error: SafetensorError) -> ValueError:
    return ValueError(f"{source} cannot be read as safetensors ({error}): foreign, or cut short; save it again")


def _malformed(source: str, what: str) -> ValueError:
    return ValueError(f"{source} has a manifest {what}, so paged-cache did not write it; give a file that it wrote")
