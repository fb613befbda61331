"""The workloads: named shapes of one call, and the base set."""

import dataclasses
import re

MODES = ("decode", "prefill", "mixed", "write")
DTYPES = {"bfloat16": 2, "float32": 4, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1}
"""Types of the stored keys and values, with their bytes. Queries are float32 for float32 pages, else bfloat16."""
STEADY_TOKENS = 16384
"""Difference of the two lengths of one sequence: eight blocks of 2048 keys, too many for prefetch to hide."""
BATCH_TOKENS = 8192
"""Keys of the smaller of two batches of many sequences."""
LONG = 8192
"""From this context on, decode is measured with one sequence of two lengths."""
Batch = list[tuple[int, int]]
"""Tokens and new rows of each sequence."""
_NAME = re.compile(
    r"(?P<mode>[a-z]+)-((?P<q_heads>\d+)-)?(?P<kv_heads>\d+)-(?P<head_dim>\d+)"
    r"(-p(?P<page_size>\d+))?(-n(?P<new_tokens>\d+))?(-c(?P<context>\d+))?(-w(?P<window>\d+))?(-(?P<dtype>[a-z]\w+))?"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """The shape of one call. Its name tells all of it, such as `decode-32-8-128-p16-c8192`.

    Raises:
        ValueError: no call can have this shape.
    """

    mode: str
    """`decode`: sequences with one new row. `prefill`: one sequence with `new_tokens` rows. `mixed`: both, with 16
    sequences of `decode`. `write`: the page write of a decode step."""
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int = 16
    new_tokens: int = 1
    context: int = 0
    """Tokens in pages. Decode: all tokens of a sequence. Prefill: the tokens before the new ones."""
    window: int | None = None
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} must be one of {', '.join(MODES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        if self.q_heads % self.kv_heads:
            raise ValueError(f"q_heads={self.q_heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.context % self.page_size:
            raise ValueError(f"context={self.context} must be a multiple of page_size={self.page_size} (whole pages)")

    @classmethod
    def parse(cls, name: str) -> "Workload":
        """Returns the workload of a name. Missing parts get defaults: pages of 16, context 8192 for decode.

        >>> Workload.parse("prefill-8-1-128-n512-c2048").name
        'prefill-8-1-128-p16-n512-c2048'

        Raises:
            ValueError: the name has another form.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"workload {name!r} must be MODE-QHEADS-KVHEADS-HEADDIM[-pPAGE][-nNEW][-cCONTEXT][-wWINDOW][-DTYPE], "
                "for example decode-32-8-128-p16-c8192; write has no QHEADS: write-8-128"
            )
        given = {key: value for key, value in match.groupdict().items() if value is not None}
        sizes = {key: int(value) for key, value in given.items() if key not in {"mode", "dtype"}}
        sizes.setdefault("q_heads", sizes["kv_heads"])
        if given["mode"] == "decode":
            sizes.setdefault("context", 8192)
        if given["mode"] in {"prefill", "mixed"}:
            sizes.setdefault("new_tokens", 512)
        return cls(mode=given["mode"], dtype=given.get("dtype", "bfloat16"), **sizes)

    @property
    def name(self) -> str:
        """The shortest name of this workload. It always has the page size."""
        heads = f"{self.kv_heads}" if self.mode == "write" else f"{self.q_heads}-{self.kv_heads}"
        parts = [self.mode, heads, f"{self.head_dim}", f"p{self.page_size}"]
        if self.mode in {"prefill", "mixed"}:
            parts.append(f"n{self.new_tokens}")
        if self.mode != "write":
            parts.append(f"c{self.context}")
        if self.window is not None:
            parts.append(f"w{self.window}")
        if self.dtype != "bfloat16":
            parts.append(self.dtype)
        return "-".join(parts)

    @property
    def unit(self) -> str:
        """The unit of the figures: a page that is attended, a row that is written, or a call."""
        return {"decode": "page", "write": "row"}.get(self.mode, "call")

    @property
    def tokens(self) -> int:
        """Tokens per unit: the keys of a page, one row, or the new rows of a call."""
        if self.unit == "page":
            return self.page_size
        return 1 if self.mode == "write" else sum(new for _, new in self.batches[0])

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The batches that are compiled. If there are two, their difference is the steady state.

        Decode over a long context is one sequence, which grows from half of `context`, as in published figures. Decode
        over a short context or with a window is many sequences with `BATCH_TOKENS` keys, and then twice as many. So
        the figures include the cost of each sequence.
        """
        if self.mode == "decode" and self.is_long:
            shorter = self.context // 2
            return ([(shorter, 1)], [(shorter + STEADY_TOKENS, 1)])
        decode = [(self.context, 1)]
        if self.mode == "decode":
            seqs = max(2, BATCH_TOKENS // (self.pages_seen * self.page_size))
            return (decode * seqs, decode * 2 * seqs)
        if self.mode == "write":
            rows = [(seq % self.page_size + 1, 1) for seq in range(64)]
            return (rows[:32], rows)
        chunk = [(self.context + self.new_tokens, self.new_tokens)]
        return (chunk,) if self.mode == "prefill" else (decode * 16 + chunk,)

    @property
    def is_long(self) -> bool:
        """True if the pages take nearly all time of a decode step, and the cost per sequence does not matter."""
        return self.context >= LONG and self.window is None

    @property
    def units(self) -> int:
        """The number of units by which the two batches differ, or 1 for a call."""
        if self.unit == "call":
            return 1
        fewer, more = (sum(self.units_of(tokens) for tokens, _ in batch) for batch in self.batches)
        return more - fewer

    def units_of(self, tokens: int) -> int:
        """Returns the pages that a decoding sequence of `tokens` reads, or 1 for the row that it writes."""
        if self.mode == "write":
            return 1
        return -(-min(tokens, self.window or tokens) // self.page_size)

    @property
    def page_bytes(self) -> int:
        """Bytes of keys and values in a page, without scales or padding."""
        return 2 * self.kv_heads * self.head_dim * self.page_size * DTYPES[self.dtype]

    @property
    def pages_seen(self) -> int:
        """Pages of `context` tokens, or of the window if there is one."""
        return self.units_of(self.context)

    def bytes_needed(self) -> int:
        """Returns the least bytes that a unit reads from HBM: its keys and values, each once."""
        if self.mode == "decode":
            return self.page_bytes
        if self.mode == "write":  # the tile of 8 slots that contains the row's slot, and the row
            return self.page_bytes // self.page_size * (8 + 1)
        return sum(-(-tokens // self.page_size) for tokens, _ in self.batches[0]) * self.page_bytes

    def flops(self, width: int = 1) -> int:
        """Returns the operations of a call's two products, over the pairs of row and key that the mask allows.

        Args:
            width: width of a matrix unit. The head size is rounded up to it.
        """
        pairs = 0
        for tokens, new in self.batches[0]:
            seen = (min(tokens - new + row + 1, self.window or tokens) for row in range(new))
            pairs += sum(seen)
        return 4 * self.q_heads * -(-self.head_dim // width) * width * pairs


DECODE = (
    *(f"decode-{heads}-128-p16-c8192" for heads in ("32-8", "64-8", "8-1", "32-32")),
    *(f"decode-{heads}-p16-c8192" for heads in ("32-8-64", "32-8-256", "8-1-64", "8-1-256")),
    *(f"decode-32-8-128-p{page}-c8192" for page in (32, 64, 128)),
    *(f"decode-{heads}-128-p16-c{context}" for heads in ("32-8", "8-1") for context in (512, 2048)),
    "decode-8-1-128-p64-c8192",
)
PREFILL = (
    *(f"prefill-8-1-128-p16-n{new}-c{before}" for new in (512, 2048) for before in (0, 2048, 8192)),
    "prefill-32-8-128-p16-n512-c2048",
)
GROUPS = {
    "decode": DECODE,
    "prefill": PREFILL,
    "mixed": ("mixed-8-1-128-p16-n512-c2048",),
    "window": tuple(f"decode-{of}-w1024" for of in ("32-8-128-p16-c8192", "8-1-128-p16-c8192", "8-1-128-p16-c2048")),
    "quantised": tuple(f"decode-32-8-128-p32-c8192-{dtype}" for dtype in ("int8", "float8_e4m3fn")),
    "write": tuple(f"write-{heads}-128-p16" for heads in (8, 1)),
}
"""The parts of the base set by name."""


def choose(names: list[str]) -> list[Workload]:
    """Returns the workloads of these names and parts of the base set, each once. Without names, the base set.

    Raises:
        ValueError: a name is neither a workload nor a part.
    """
    wanted = [name for given in names or GROUPS for name in GROUPS.get(given, (given,))]
    return list(dict.fromkeys(Workload.parse(name) for name in wanted))
