"""Archives whose checksums are right and whose facts are not."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from paged_cache._src.transfer import archive
from paged_cache._src.transfer.archive import Archive

VALUES = (None, True, -1, 0, 1, 3, 2**70, 1.5, float("nan"), "", "x", [], {}, [[]], ["int32"], {"kind": "full"})
"""What each value of a manifest is replaced by."""


def manifest_of(data: bytes) -> dict[str, Any]:
    """The manifest of an archive."""
    return json.loads(load(data)[archive.MANIFEST].tobytes())


def signed(data: bytes, manifest: Any) -> bytes:
    """The archive with another manifest, as an object or as bytes, and the checksum of that."""
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    stored = load(data)
    stored[archive.MANIFEST] = np.frombuffer(text, np.uint8)
    stored[archive.DIGEST] = np.frombuffer(archive._sha256(stored[archive.MANIFEST]), np.uint8)
    return save(stored)


def other_manifests(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The archive with each value of its manifest, at any depth, replaced, left out, or given a neighbour."""
    manifest = manifest_of(data)
    for path in paths(manifest):
        for value in VALUES:
            yield f"{path} = {value}", signed(data, changed(manifest, path, value))
        yield f"{path} left out", signed(data, without(manifest, path))
        if isinstance(at(manifest, path), dict):
            yield f"{path} and another", signed(data, changed(manifest, (*path, "another"), 1))
    for value in VALUES:
        yield f"{value} in its place", signed(data, value)
    for text in (b"", b"\xff{}", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000):
        yield f"{text[:8]}..", signed(data, text)


def other_arrays(data: bytes, kind: str) -> Iterator[tuple[str, bytes]]:
    """The archive with each of its arrays of another shape, of another type, with other numbers, and missing."""
    whole = Archive.from_bytes(data, kind)
    for name, array in whole.arrays.items():
        for what, other in enumerate(_others(array)):
            yield f"{name}, {what}", Archive(kind, whole.facts, whole.arrays | {name: other}).to_bytes()
        rest = {other: array for other, array in whole.arrays.items() if other != name}
        yield f"without {name}", Archive(kind, whole.facts, rest).to_bytes()
        yield f"twice {name}", Archive(kind, whole.facts, whole.arrays | {f"{name}2": array}).to_bytes()


def _others(array: np.ndarray) -> Iterator[np.ndarray]:
    yield from (array[:0], array[:1], array[:-1], array[1:], array[::-1], np.concatenate([array, array[-1:]]))
    yield from (array[None], array.reshape(-1), array[..., None], np.roll(array, 1))
    yield from (array.view(np.uint8), array.astype(np.float32), np.zeros_like(array))
    if array.dtype == np.int32:
        for value in (-1, 1, 7, 2**30, 2**31 - 1, -(2**31)):
            for index in (0, array.size // 2, array.size - 1):
                other = array.copy()
                other.flat[index] = value
                yield other
        yield array[np.zeros(len(array), int)]  # the first one, as often as there are any


def paths(thing: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of each value of a JSON object."""
    items = thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


def at(thing: Any, path: tuple) -> Any:
    """The value at a path."""
    for key in path:
        thing = thing[key]
    return thing


def changed(thing: Any, path: tuple, value: Any) -> Any:
    """A copy with another value at a path."""
    thing = copy.deepcopy(thing)
    at(thing, path[:-1])[path[-1]] = value
    return thing


def without(thing: Any, path: tuple) -> Any:
    """A copy without the value at a path."""
    thing = copy.deepcopy(thing)
    del at(thing, path[:-1])[path[-1]]
    return thing
