"""GGUF files byte by byte, right and wrong ones."""

import struct

import gguf

KINDS = gguf.GGUFValueType
_FORMS = {KINDS.UINT32: "<I", KINDS.INT32: "<i", KINDS.FLOAT32: "<f", KINDS.BOOL: "<?", KINDS.UINT64: "<Q"}


def text(value):
    """A text as a file has it."""
    encoded = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def field(key, value, kind=None):
    """Key, kind and bytes of a value: of this kind, or of the one that files commonly have."""
    if isinstance(value, list):
        kind = field("", value[0])[1] if value else KINDS.STRING
        items = b"".join(field("", item)[2] for item in value)
        return key, KINDS.ARRAY, struct.pack("<IQ", kind, len(value)) + items
    if isinstance(value, str | bytes):
        return key, KINDS.STRING, text(value)
    usual = {bool: KINDS.BOOL, int: KINDS.INT32 if value < 0 else KINDS.UINT32, float: KINDS.FLOAT32}
    kind = usual[type(value)] if kind is None else kind
    return key, kind, struct.pack(_FORMS[kind], value)


def header(tensors, fields=(), *, version=3, count=None):
    """All before the data. A tensor is a name, its sizes with the last axis first, a kind, an offset."""
    parts = [b"GGUF", struct.pack("<IQQ", version, len(tensors) if count is None else count, len(fields))]
    parts += [text(key) + struct.pack("<I", kind) + value for key, kind, value in fields]
    for name, sizes, kind, offset in tensors:
        parts += [text(name), struct.pack("<I", len(sizes)), *(struct.pack("<Q", size) for size in sizes)]
        parts.append(struct.pack("<IQ", kind, offset % 2**64))
    content = b"".join(parts)
    return content + bytes(-len(content) % 32)
