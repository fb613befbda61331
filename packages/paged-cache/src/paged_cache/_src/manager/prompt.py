"""Prompts: token ids, and everything else that their keys and values depend on."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from paged_cache._src.manager.arrays import least, most
from paged_cache._src.manager.prefix import Content, Media, hash_page, media_bytes, root_hash

TOKEN_DTYPE = np.dtype("<i4")
"""The dtype of token ids. Its byte order is fixed, so that hashes are the same on every machine."""


class Prompt:
    """Token ids with a namespace, an adapter and media. Two prompts share pages only if all of these are equal.

    Each full page is hashed once, so a prompt that waits in a queue costs no more hashes.
    """

    def __init__(
        self, token_ids: ArrayLike, *, namespace: str = "", adapter: str = "", media: Sequence[Media] = ()
    ) -> None:
        """Create a prompt.

        Args:
            token_ids: at least one token id.
            namespace: prompts of different namespaces never share pages. Give each tenant its own: then none can learn
                from the time to its first token what others have asked.
            adapter: anything else that keys and values depend on, such as the name of a LoRA adapter.
            media: pictures or sounds that some of the tokens stand for.

        Raises:
            ValueError: there is no token, or an entry is not a token id.
        """
        array = np.array(token_ids)  # a copy: the caller may change theirs after it was hashed
        if array.ndim != 1 or not array.size:
            raise ValueError(f"token_ids has shape {array.shape}; it must be a list of at least one token id")
        self.token_ids = check_tokens(array, array.size)
        self._bytes = self.token_ids.tobytes()
        self.media = tuple(sorted(media, key=lambda item: item.start))  # the same hashes in any order
        self._root = root_hash(namespace, adapter)
        self._full_pages: dict[int, list[Content]] = {}  # by page size

    @classmethod
    def of(cls, prompt: "Prompt | ArrayLike") -> "Prompt":
        """The prompt itself, or a new one for token ids."""
        return prompt if isinstance(prompt, Prompt) else cls(prompt)

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.token_ids)

    def prefix_hash(self, n: int, page_size: int) -> bytes:
        """The hash of the first `n` pages; the root hash for 0."""
        return self._hash_pages(n, page_size)[n - 1][0] if n else self._root

    def prefix_hashes(self, n: int, page_size: int) -> list[bytes]:
        """The hashes of the first 0, 1, .. `n` pages."""
        return [self._root, *[page_hash for page_hash, _, _, _ in self._hash_pages(n, page_size)[:n]]]

    def full_page(self, page: int, page_size: int) -> Content:
        """The content of the full page with this number, counted from 0."""
        return self._hash_pages(page + 1, page_size)[page]

    def _hash_pages(self, n: int, page_size: int) -> list[Content]:
        """The contents of at least the first `n` full pages; hashes those that are new."""
        pages, size = self._full_pages.setdefault(page_size, []), page_size * TOKEN_DTYPE.itemsize
        for page in range(len(pages), n):
            parent_hash, token_ids = pages[-1][0] if pages else self._root, self._bytes[page * size : (page + 1) * size]
            media = media_bytes(self.media, page * page_size, (page + 1) * page_size) if self.media else b""
            pages.append((hash_page(parent_hash, token_ids, media), parent_hash, token_ids, media))
        return pages


def check_tokens(token_ids: ArrayLike, n: int) -> np.ndarray:
    """Return `n` token ids as an array of `TOKEN_DTYPE`.

    Raises:
        ValueError: there are not `n` entries, or an entry is not a token id.
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
