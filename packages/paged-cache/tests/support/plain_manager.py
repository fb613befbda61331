"""A model of the page manager without pages: the tokens of each sequence, and the longest allowed cache hits."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from simulated_device import Contents

from paged_cache._src.manager import LayerGroup, Media


def first_seen(group: LayerGroup, computed: int) -> int:
    """The first position that a query at `computed` or later sees."""
    sees = {
        "full": lambda query, key: True,
        "cross": lambda query, key: True,
        "window": lambda query, key: query - key < group.tokens,
        "chunked": lambda query, key: query // group.tokens == key // group.tokens,
    }[group.kind]
    return next(key for key in range(computed + 1) if sees(computed, key))


@dataclasses.dataclass
class PlainSequence:
    """One sequence. Lists have an entry for each token that has a slot."""

    namespace: str
    pictures: dict[int, tuple[int, bytes]]
    """For each picture, by its first token: its end and its digest."""
    rest: list[int]
    """Tokens of the prompt that have no slot yet."""
    cross: list[int]
    """What cross-attention stores for it."""
    root: int
    """The number of its namespace and adapter, where the contents start."""
    contents: list[int] = dataclasses.field(default_factory=list)
    """What the device stores."""
    tokens: list[int] = dataclasses.field(default_factory=list)
    known: list[bool] = dataclasses.field(default_factory=list)
    """True if the manager knows the token id."""
    computed: int = 0
    """Tokens that are committed."""
    written: int = 0
    """Tokens that are on the device, committed or not."""
    settled: int = 0
    """Tokens that were computed when a window last released pages."""
    cross_written: bool = False
    host_pages: int = 0
    """Pages that it takes on the host."""
    forgotten: bool = False
    """True if its pages must not be indexed (since a reset)."""

    @property
    def swapped(self) -> bool:
        """True if it is swapped out."""
        return self.host_pages > 0

    @property
    def length(self) -> int:
        """Tokens with a slot."""
        return len(self.tokens)


class PlainManager:
    """Sequences by id, and all contents that were committed with known tokens."""

    def __init__(self, num_groups: int) -> None:
        self.contents = Contents(num_groups)
        self.sequences: dict[int, PlainSequence] = {}
        self.committed: set[int] = set()
        self._ids_given: set[int] = set()

    def new_sequence(
        self,
        cross: tuple[int, int] = (0, 0),
        *,
        namespace: str = "",
        adapter: str = "",
        media: Sequence[Media] = (),
    ) -> PlainSequence:
        """A sequence without tokens; `cross` names what cross-attention sees, and says how many tokens that is.

        Its own tokens depend on that too. A picture at the start says what it is; without, nothing else is like it.
        """
        pictures = {item.start: (item.stop, item.digest) for item in media}
        return PlainSequence(
            namespace=namespace,
            pictures=pictures,
            rest=[],
            cross=self.contents.chain(self.contents.root("cross", namespace, cross), range(cross[1])),
            root=self.contents.root("text", namespace, adapter, () if 0 in pictures or not cross[1] else cross),
        )

    def append(self, sequence: PlainSequence, tokens: Sequence[int], *, known: bool) -> None:
        """Slots for more tokens of a sequence."""
        start = sequence.length
        text = [(token, sequence.pictures.get(start + index)) for index, token in enumerate(tokens)]
        last = sequence.contents[-1] if sequence.contents else sequence.root
        sequence.contents += self.contents.chain(last, text)
        sequence.tokens += tokens
        sequence.known += [known] * len(tokens)
        del sequence.rest[: len(tokens)]

    def hit_bound(self, tokens: Sequence[int], **depends_on: Any) -> int:
        """The longest allowed cache hit: the part of the prompt that was committed before."""
        sequence = self.new_sequence(**depends_on)
        self.append(sequence, tokens, known=True)
        new = (at for at, content in enumerate(sequence.contents) if content not in self.committed)
        return next(new, len(tokens))

    def add(self, seq: int, sequence: PlainSequence) -> None:
        """Add a sequence with a new id."""
        assert seq not in self._ids_given, f"id {seq} is given twice"
        self._ids_given.add(seq)
        self.sequences[seq] = sequence

    def commit(self, seq: int, count: int, *, tell: bool) -> None:
        """Commit `count` tokens: from now on they may be cache hits, if they are known."""
        sequence = self.sequences[seq]
        new = range(sequence.computed, sequence.computed + count)
        for position in new:
            sequence.known[position] |= tell
        sequence.computed = sequence.settled = new.stop
        named = next((at for at, known in enumerate(sequence.known) if not known), new.stop)
        if not sequence.forgotten:
            self.committed.update(sequence.contents[: min(named, new.stop)])

    def forget(self) -> None:
        """Forbid cache hits on everything that was computed so far."""
        self.committed.clear()
        for sequence in self.sequences.values():
            sequence.forgotten = True

    def fork(self, seq: int, ids: Sequence[int]) -> None:
        """Add copies of a sequence."""
        source = self.sequences[seq]
        for each in ids:
            lists = {name: list(getattr(source, name)) for name in ("contents", "tokens", "known", "rest")}
            self.add(each, dataclasses.replace(source, **lists))

    def truncate(self, seq: int, num_tokens: int) -> None:
        """Shorten a sequence to `num_tokens` tokens."""
        sequence = self.sequences[seq]
        sequence.rest = []
        for entries in (sequence.contents, sequence.tokens, sequence.known):
            del entries[num_tokens:]
        for name in ("computed", "written", "settled"):
            setattr(sequence, name, min(getattr(sequence, name), num_tokens))
