"""A page manager, a plain model of it and a simulated device: each operation runs on all three and is compared."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from failures import Failure
from invariants import check_all
from managing import picture, refused
from plain_manager import PlainManager, PlainSequence, first_seen
from simulated_device import SimulatedDevice

from paged_cache._src.manager import LayerGroup, OutOfPages, PageEvent, PageManager, Pin, Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The arguments of a manager."""

    page_size: int = 2
    num_pages: int = 9
    groups: tuple[LayerGroup, ...] = (LayerGroup.full(),)
    prefix_reuse: bool = True
    scrub: bool = False
    num_host_pages: int = 0
    max_seqs: int = 5
    max_sequence_length: int = 12

    def manager(self) -> PageManager:
        """A new manager."""
        return PageManager(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    @property
    def has_cross(self) -> bool:
        """True if there is a cross-attention group."""
        return not all(group.is_self_attention for group in self.groups)

    def num_pages_of(self, length: int, cross_tokens: int) -> int:
        """The most pages of a sequence, over all groups."""
        return sum(-(-(length if group.is_self_attention else cross_tokens) // self.page_size) for group in self.groups)


class SeenEvents:
    """A subscriber that tracks the indexed pages."""

    def __init__(self) -> None:
        self.indexed: dict[int, bytes] = {}
        self.evicted = 0

    def __call__(self, events: list[PageEvent]) -> None:
        for event in events:
            if event.kind == "stored":
                assert event.page not in self.indexed, f"{event}, but it holds something else"
                self.indexed[event.page] = event.hash
            elif event.kind in ("removed", "evicted"):
                assert self.indexed.pop(event.page) == event.hash, f"{event}, but it held something else"
                self.evicted += event.kind == "evicted"


class CheckedManager:
    """Runs each operation on manager, model and device, and then checks all invariants.

    An operation that runs out of pages gives `None` or `False`; by then it has been checked that it changed nothing and
    that its account is right. With `failures`, each operation is first made to fail at each, and must not change
    anything then either.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.manager = config.manager()
        self.plain = PlainManager(len(config.groups))
        self.device = SimulatedDevice(config.num_pages, config.page_size, config.num_host_pages + 1)
        self.events = SeenEvents()
        self.manager.subscribe(self.events)
        self.pins: list[Pin] = []
        self.names: dict[bytes, int] = {}
        """The content of each hash so far."""
        self.failures: Sequence[Failure] = ()
        self.operations = self.failed = self.out_of_pages = self.queried = self.reused = 0

    def __getitem__(self, seq: int) -> PlainSequence:
        return self.plain.sequences[seq]

    @property
    def running(self) -> list[int]:
        """Sequences that are not swapped out."""
        return [seq for seq, sequence in self.plain.sequences.items() if not sequence.swapped]

    def admit(self, tokens, *, chunk=None, cross_tokens=0, **depends_on) -> int | None:
        """Add a sequence. Its cache hit is what `find` says, or without the tail if pages are short."""
        found = self.find(tokens, **depends_on)
        free, whole = self.manager.num_free, found // self.config.page_size * self.config.page_size
        needs = self.manager.pages_to_admit(Prompt(tokens, **depends_on), cross_tokens=cross_tokens)
        most = needs if chunk is None else self.config.num_pages_of(min(len(tokens), found + chunk), cross_tokens)
        options = {"chunk": chunk, "cross_tokens": cross_tokens}
        seq = self._do(lambda manager: manager.admit(Prompt(tokens, **depends_on), **options), most)
        if seq is not None:
            reused = int(self.manager.computed(seq)[0])
            assert reused in (found, whole), f"reused {reused} tokens, but found {found}"
            self.queried, self.reused = self.queried + len(tokens), self.reused + reused
            assert chunk or self.manager.num_free == free - needs, f"pages_to_admit says {needs}"
            sequence = self.plain.new_sequence((self.operations, cross_tokens), **depends_on)
            sequence.rest = list(tokens)
            self.plain.append(sequence, tokens[: reused + (chunk or len(tokens))], known=True)
            sequence.computed = sequence.written = reused
            sequence.settled = whole
            self.plain.add(seq, sequence)
        check_all(self)
        return seq

    def find(self, tokens, **depends_on) -> int:
        """The length of the cache hit: at most the committed tokens, and not the whole prompt."""
        before = picture(self.manager)
        found = self._do(lambda manager: manager.cached_tokens(Prompt(tokens, **depends_on)))
        assert picture(self.manager) == before, "finding takes something"
        bound = self._hit_bound(tokens, **depends_on)
        assert 0 <= found <= min(bound, len(tokens) - 1), f"found {found} tokens of {bound} that were computed"
        return found

    def _hit_bound(self, tokens, **depends_on) -> int:
        """The longest allowed cache hit. With cross-attention, a picture at token 0 must identify the other text."""
        named = not self.config.has_cross or any(item.start == 0 for item in depends_on.get("media", ()))
        return self.plain.hit_bound(tokens, **depends_on) if self.config.prefix_reuse and named else 0

    def extend(self, tokens: dict[int, Sequence[int]], *, tell: bool = True) -> bool:
        """Add slots for these tokens of each sequence."""
        counts = [len(each) for each in tokens.values()]
        flat = [token for each in tokens.values() for token in each] if tell else None
        pages = [
            -(-(self[seq].length % self.config.page_size + len(new)) // self.config.page_size)
            for seq, new in tokens.items()
        ]
        most = sum(pages) * sum(group.is_self_attention for group in self.config.groups)
        done = self._do(lambda manager: manager.extend(list(tokens), counts, flat), most)
        for seq, new in tokens.items() if done else ():
            self.plain.append(self[seq], new, known=tell)
        check_all(self)
        return bool(done)

    def run(self, seqs: Sequence[int]) -> None:
        """Run a step of the model: apply the moves, then write all tokens that are not committed."""
        self.device.apply(self.manager.take_moves())
        check_all(self)
        refcounts = self.manager.refcounts(np.arange(self.config.num_pages))
        for seq in seqs:
            sequence = self[seq]
            for index, (group, table) in enumerate(
                zip(self.config.groups, self.manager.page_tables(seq)[:, 0], strict=True)
            ):
                start = sequence.computed if group.is_self_attention else len(sequence.cross) * sequence.cross_written
                contents = sequence.contents if group.is_self_attention else sequence.cross
                self.device.write(table, start, self.plain.contents.cells(contents[start:], index), refcounts)
            sequence.written, sequence.cross_written = sequence.length, True
        check_all(self)

    def commit(self, counts: dict[int, int], *, tell: bool = True) -> None:
        """Commit the next tokens of each sequence."""
        tokens = [token for seq, n in counts.items() for token in self[seq].tokens[self[seq].computed :][:n]]
        for seq, n in counts.items():
            assert self[seq].computed + n <= self[seq].written, "the test commits what was not written"
        arguments = list(counts), list(counts.values()), tokens if tell else None
        self._do(lambda manager: manager.commit(*arguments))
        for seq, n in counts.items():
            self.plain.commit(seq, n, tell=tell)
        check_all(self)

    def step(self, *seqs: int) -> None:
        """Run and commit all remaining tokens of these sequences, or of all running ones."""
        behind = [seq for seq in seqs or self.running if self[seq].computed < self[seq].length]
        self.run(behind)
        if behind:
            self.commit({seq: self[seq].length - self[seq].computed for seq in behind})

    def fork(self, seq: int, n: int = 1) -> list[int]:
        """Add `n` copies of a sequence."""
        ids = self._do(lambda manager: manager.fork(seq, n))
        assert len(ids) == n
        self.plain.fork(seq, ids)
        check_all(self)
        return ids

    def truncate(self, seq: int, num_tokens: int) -> bool:
        """Shorten a sequence. Must be refused if a window needs released pages."""
        if gone := num_tokens < self[seq].computed and self._returned(seq, num_tokens):
            self.refuses("too far back", lambda manager: manager.truncate(seq, num_tokens))
        else:
            self._do(lambda manager: manager.truncate(seq, num_tokens))
            self.plain.truncate(seq, num_tokens)
        check_all(self)
        return not gone

    def _returned(self, seq: int, num_tokens: int) -> bool:
        """True if a page is released that a query after `num_tokens` tokens needs."""
        tables = zip(self.config.groups, self.manager.page_tables(seq)[:, 0], strict=True)
        needed = [(first_seen(group, num_tokens), table) for group, table in tables if group.is_windowed]
        return any(table[first // self.config.page_size] == 0 for first, table in needed)

    def release(self, *seqs: int) -> None:
        """Release sequences."""
        self._do(lambda manager: manager.release(list(seqs)))
        for seq in seqs:
            del self.plain.sequences[seq]
        check_all(self)

    def swap_out(self, seq: int) -> bool:
        """Swap out, if there are enough host pages."""
        free = self.config.num_host_pages - sum(each.host_pages for each in self.plain.sequences.values())
        needs = int((self.manager.page_tables(seq) > 0).sum())
        done = self._do(lambda manager: manager.swap_out(seq), needs)
        assert bool(done) == (needs <= free), f"{needs} pages go to the host, where {free} are free"
        self[seq].host_pages = needs if done else 0
        check_all(self)
        return bool(done)

    def swap_in(self, seq: int) -> bool:
        """Swap in, if there are enough pages."""
        needs, free = self[seq].host_pages, self.manager.num_free
        done = self._do(lambda manager: manager.swap_in(seq), needs)
        assert bool(done) == (needs <= free), f"{needs} pages are needed of {free}"
        self[seq].host_pages = 0 if done else needs
        check_all(self)
        return bool(done)

    def pin(self, tokens, **depends_on) -> Pin:
        """Pin the full pages of a text."""
        pin = self._do(lambda manager: manager.pin(Prompt(tokens, **depends_on)))
        assert pin.num_tokens <= self._hit_bound(tokens, **depends_on)
        self.pins.append(pin)
        check_all(self)
        return pin

    def unpin(self, pin: Pin) -> None:
        """Unpin them."""
        self._do(lambda manager: manager.unpin(pin))
        self.pins.remove(pin)
        check_all(self)

    def reset_prefix_cache(self) -> None:
        """Drop all pages from the index."""
        self._do(lambda manager: manager.reset_prefix_cache())
        self.plain.forget()
        assert not self.manager.indexed_pages()
        check_all(self)

    def restore(self) -> None:
        """Reset the prefix cache, and restore it from a copy as far as there are empty pages."""
        self.device.apply(self.manager.take_moves())
        kept = self.manager.indexed_pages()
        copies = self.device.pages[[content.page for content in kept]]
        self._do(lambda manager: manager.reset_prefix_cache())  # of the plain manager's bound nothing changes
        self.device.apply(self.manager.take_moves())
        empty = self.manager.stats().num_empty
        pages = self._do(lambda manager: manager.restore(kept))
        assert (pages > 0).sum() == min(empty, len(kept)), "a page that is not here is left out though there is room"
        self.device.apply(self.manager.take_moves())
        self.device.pages[pages[pages > 0]] = copies[pages > 0]
        check_all(self)

    def refuses(self, message: str, operation: Callable[[PageManager], Any]) -> None:
        """Check that a wrong call raises ValueError and changes nothing."""
        with refused(self.manager, ValueError, message):
            operation(self.manager)

    def _do(self, operation: Callable[[PageManager], Any], most: int = 0) -> Any:
        """The operation's result, or `True` if it has none. `None` if it needs up to `most` pages and they run out."""
        before = picture(self.manager)
        for failure in self.failures:
            if failure.planted_in(operation, self.manager, self.pins):
                self.failed += 1
                assert picture(self.manager) == before, f"{failure} changes the manager"
        self.operations += 1
        try:
            result = operation(self.manager)
        except OutOfPages as error:
            self._check_account(error, most)
            assert picture(self.manager) == before, "running out of pages changes the manager"
            self.out_of_pages += 1
            return None
        return True if result is None else result

    def _check_account(self, error: OutOfPages, most: int) -> None:
        """Check the numbers of an OutOfPages: more than are free, at most `most`."""
        assert error.free < error.asked <= most, f"asked for {error.asked} of {error.free}; {most} are enough"
