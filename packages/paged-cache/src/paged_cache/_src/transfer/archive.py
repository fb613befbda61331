"""A safetensors file of arrays and facts, with checksums that detect any changed byte."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, load_file, save, save_file

FORMAT = "paged-cache"
VERSION = 1
MANIFEST = "manifest"
DIGEST = "manifest.sha256"


@dataclasses.dataclass(frozen=True)
class Archive:
    """Named arrays, and facts that the reader compares with its own cache.

    Arrays are stored as bytes, because safetensors has no numpy type for bfloat16 and 8-bit floats. A manifest
    describes them. It is JSON, stored in an array of its own with its sha256 in another:

        {"format": "paged-cache", "kind": ..., "version": 1, "facts": {...},
         "arrays": {name: {"dtype": ..., "shape": [...], "sha256": ...}}}

    The checksums detect damaged and truncated files. They do not protect against someone who can write the file.
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
        """Write the file. It is written under another name and then renamed, so `path` is never half written."""
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(self._stored(), unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def from_bytes(cls, data: bytes, kind: str) -> Self:
        """Read the result of `to_bytes`.

        Raises:
            ValueError: it is damaged, or not an archive of this kind; says what differs.
        """
        try:
            stored = load(data)
        except SafetensorError as error:
            raise _unreadable(f"{len(data)} bytes", error) from error
        return cls._checked(stored, kind, f"{len(data)} bytes")

    @classmethod
    def load(cls, path: str | Path, kind: str) -> Self:
        """Read a file that `save` wrote.

        Raises:
            ValueError: it is damaged, or not an archive of this kind; says what differs.
            FileNotFoundError: there is no such file.
        """
        try:
            stored = load_file(path)
        except SafetensorError as error:
            raise _unreadable(str(path), error) from error
        return cls._checked(stored, kind, str(path))

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
        for name, entry in described.items():
            if _sha256(stored[name]).hex() != entry["sha256"]:
                raise ValueError(f"{source} is damaged: array {name} does not have its checksum; save it again")
        arrays = {
            name: stored[name].view(jnp.dtype(entry["dtype"])).reshape(entry["shape"])
            for name, entry in described.items()
        }
        return cls(kind, manifest["facts"], arrays)


def _manifest(stored: dict[str, np.ndarray], kind: str, source: str) -> dict[str, Any]:
    if not {MANIFEST, DIGEST} <= stored.keys():
        raise ValueError(f"{source} has no manifest, so paged-cache did not write it; give a file that it wrote")
    if _sha256(stored[MANIFEST]) != stored[DIGEST].tobytes():
        raise ValueError(f"{source} is damaged: the manifest does not have its checksum; save it again")
    manifest = json.loads(stored[MANIFEST].tobytes())
    if manifest["format"] != FORMAT or manifest["kind"] != kind:
        raise ValueError(f"{source} holds a {manifest['kind']} of {manifest['format']}, but a {kind} is asked for")
    if manifest["version"] != VERSION:
        raise ValueError(
            f"{source} is of version {manifest['version']}, but this paged-cache reads version {VERSION}; "
            "save it again, or use the paged-cache that wrote it"
        )
    return manifest


def _as_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _sha256(array: np.ndarray) -> bytes:
    return hashlib.sha256(array.data).digest()


def _unreadable(source: str, error: SafetensorError) -> ValueError:
    return ValueError(f"{source} cannot be read as safetensors ({error}): foreign, or cut short; save it again")
