"""What a sequence starts with, and all that its keys and values depend on."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from paged_cache._src.manager.arrays import least, most
from paged_cache._src.manager.prefix import Content, Media, hash_page, media_bytes, root_hash

TOKEN_DTYPE = np.dtype("<i4")
"""Token ids are hashed as they are stored, so in the same order of bytes on every machine."""


class Prompt:
    """Token ids, and whose they are. Keys of its pages are hashed once, so a prompt that waits costs nothing more.

    Sequences share pages only if their namespace and adapter, their tokens and what the tokens stand for are the same.
    """

    def __init__(
        self, token_ids: ArrayLike, *, namespace: str = "", adapter: str = "", media: Sequence[Media] = ()
    ) -> None:
        """A prompt.

        Args:
            token_ids: at least one.
            namespace: give each tenant one of its own, so that none can learn by the clock what others asked.
            adapter: what else keys and values depend on, such as the name of a LoRA adapter.
            media: what tokens stand for whose ids do not say it.

        Raises:
            ValueError: there is no token, or one is no token id.
        """
        array = np.array(token_ids)  # a copy, which stays what was hashed
        if array.ndim != 1 or not array.size:
            raise ValueError(f"token_ids has shape {array.shape}; it must be a list of at least one token id")
        self.token_ids = check_tokens(array, array.size)
        self._bytes = self.token_ids.tobytes()
        self.media = tuple(sorted(media, key=lambda item: item.start))  # keys do not depend on how they are listed
        self._root = root_hash(namespace, adapter)
        self._full_pages: dict[int, list[Content]] = {}  # by page size

    @classmethod
    def of(cls, prompt: "Prompt | ArrayLike") -> "Prompt":
        """A prompt as it is; of token ids one without namespace, adapter and media."""
        return prompt if isinstance(prompt, Prompt) else cls(prompt)

    def __len__(self) -> int:
        """How many tokens it has."""
        return len(self.token_ids)

    def prefix_hash(self, n: int, page_size: int) -> bytes:
        """The key of the first `n` pages of this size; the root for none."""
        return self._hash_pages(n, page_size)[n - 1][0] if n else self._root

    def prefix_hashes(self, n: int, page_size: int) -> list[bytes]:
        """The root, and the keys of the first `n` pages of this size."""
        return [self._root, *[page_hash for page_hash, _, _, _ in self._hash_pages(n, page_size)[:n]]]

    def full_page(self, index: int, page_size: int) -> Content:
        """What the page of this index, of this size, holds when it is full."""
        return self._hash_pages(index + 1, page_size)[index]

    def _hash_pages(self, n: int, page_size: int) -> list[Content]:
        """All full pages so far, the first `n` among them."""
        pages, size = self._full_pages.setdefault(page_size, []), page_size * TOKEN_DTYPE.itemsize
        for page in range(len(pages), n):
            parent_hash, token_ids = pages[-1][0] if pages else self._root, self._bytes[page * size : (page + 1) * size]
            media = media_bytes(self.media, page * page_size, (page + 1) * page_size) if self.media else b""
            pages.append((hash_page(parent_hash, token_ids, media), parent_hash, token_ids, media))
        return pages


def check_tokens(token_ids: ArrayLike, n: int) -> np.ndarray:
    """`n` token ids.

    Raises:
        ValueError: there are more or fewer, or one is no token id.
    """
    array = np.asarray(token_ids)
    if array.shape != (n,):
        raise ValueError(f"token_ids has shape {array.shape}; it must hold {n} ids, all sequences' one after another")
    if n and array.dtype.kind not in "iu":
        raise ValueError(f"token_ids are {array.dtype}; they must be whole numbers in 0 .. 2**31 - 1")
    lowest, highest = least(array, if_none=0), most(array, if_none=0)
    if lowest < 0 or highest >= 2**31:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"token_ids hold {wrong}; each must lie in 0 .. 2**31 - 1; leave out token_ids that are not known yet"
        )
    return array.astype(TOKEN_DTYPE, copy=False)
