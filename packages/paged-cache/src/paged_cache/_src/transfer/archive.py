"""Arrays with facts about them in one safetensors file, in which any change of a byte is noticed."""

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
    """Named arrays, and the facts that whoever reads them has to compare with his own.

    Every array is stored as plain bytes, since safetensors has no numpy type for bfloat16 and 8-bit floats. A manifest,
    JSON in an array of its own beside its sha256, says what they are:

        {"format": "paged-cache", "kind": ..., "version": 1, "facts": {...},
         "arrays": {name: {"dtype": ..., "shape": [...], "sha256": ...}}}

    The checksums find what was damaged or cut short. They do not keep out whoever can write the file.
    """

    kind: str
    """What the arrays are together: `"sequence"` or `"prefix cache"`."""
    facts: dict[str, Any]
    """What JSON can say: numbers, text, lists and dictionaries."""
    arrays: dict[str, np.ndarray]

    def to_bytes(self) -> bytes:
        """The file's content."""
        return save(self._stored())

    def save(self, path: str | Path) -> None:
        """Write the file under another name, then give it its own: so there is never half a file at `path`."""
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(self._stored(), unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def from_bytes(cls, data: bytes, kind: str) -> Self:
        """The archive that `to_bytes` made.

        Raises:
            ValueError: it is not one of this kind, or damaged; says what differs.
        """
        try:
            stored = load(data)
        except SafetensorError as error:
            raise _unreadable(f"{len(data)} bytes", error) from error
        return cls._checked(stored, kind, f"{len(data)} bytes")

    @classmethod
    def load(cls, path: str | Path, kind: str) -> Self:
        """The archive that `save` wrote.

        Raises:
            ValueError: it is not one of this kind, or damaged; says what differs.
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
            raise ValueError(f"{source} has not the arrays of its manifest: {', '.join(differing)}; save it again")
        for name, is_said in described.items():
            if _sha256(stored[name]).hex() != is_said["sha256"]:
                raise ValueError(f"{source} is damaged: array {name} does not have its checksum; save it again")
        arrays = {
            name: stored[name].view(jnp.dtype(is_said["dtype"])).reshape(is_said["shape"])
            for name, is_said in described.items()
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
