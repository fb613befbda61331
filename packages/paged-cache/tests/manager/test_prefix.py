import hashlib
import struct

import numpy as np
import pytest
from managing import add

from paged_cache._src.manager.prefix import (
    PARTIAL_CANDIDATES,
    IndexedPage,
    Media,
    PrefixIndex,
    hash_page,
    media_bytes,
    root_hash,
)

ROOT = root_hash("", "")


def tokens(*ids):
    return np.array(ids, "<i4").tobytes()


def content(page, *ids, parent_hash=ROOT, group=0, media=b"", full=True):
    page_hash = hash_page(parent_hash, tokens(*ids), media) if full else b""
    return IndexedPage(
        page=page, group=group, hash=page_hash, parent_hash=parent_hash, token_ids=tokens(*ids), media=media
    )


def index_of(*contents):
    index = PrefixIndex(num_groups=2, num_pages=20)
    assert all(add(index, each) for each in contents)
    return index


def find(index, content, **changes):
    return index.lookup(content.group, content._replace(**changes).content)


def test_a_hash_is_the_sha256_of_the_parent_hash_tokens_and_media():
    assert hash_page(ROOT, tokens(1, 2), b"m") == hashlib.sha256(ROOT + struct.pack("<ii", 1, 2) + b"m").digest()
    assert hash_page(hash_page(ROOT, tokens(1), b""), tokens(2), b"") != hash_page(ROOT, tokens(1, 2), b"")


def test_names_that_run_into_each_other_have_different_roots():
    names = [("", ""), ("a", ""), ("", "a"), ("ab", "c"), ("a", "bc"), ("é", ""), ("a\0", "")]
    assert len({root_hash(*each) for each in names}) == len(names)


def test_media_are_named_by_digest_and_place_in_the_page():
    picture = [Media(start=2, stop=6, digest=b"cat")]
    assert media_bytes(picture, 0, 2) == media_bytes(picture, 6, 8) == b""
    seen = [
        media_bytes(picture, 0, 4),
        media_bytes(picture, 4, 8),
        media_bytes([Media(start=3, stop=6, digest=b"cat")], 0, 4),
        media_bytes([Media(start=2, stop=3, digest=b"cat")], 0, 4),
        media_bytes([Media(start=2, stop=6, digest=b"dog")], 0, 4),
        media_bytes(picture * 2, 0, 4),
    ]
    assert len(set(seen)) == len(seen)


def test_the_place_of_media_in_a_page_does_not_depend_on_the_page():
    assert media_bytes([Media(start=1, stop=3, digest=b"cat")], 0, 4) == media_bytes(
        [Media(start=9, stop=11, digest=b"cat")], 8, 12
    )


@pytest.mark.parametrize(("start", "stop"), [(2, 2), (3, 2), (-1, 2)])
def test_media_without_tokens_are_refused(start, stop):
    with pytest.raises(ValueError, match=f"start={start}, stop={stop} must be in order: tokens start .. stop - 1"):
        Media(start=start, stop=stop, digest=b"cat")


def test_media_without_a_digest_are_refused():
    with pytest.raises(ValueError, match="digest is empty; give a hash of the content, such as its sha256"):
        Media(start=0, stop=1, digest=b"")


def test_lookup_finds_a_page_by_hash_in_its_own_group():
    page = content(5, 1, 2)
    index = index_of(page)
    assert find(index, page) == 5
    assert index.contains(0, page.content)
    assert not index.contains(1, page.content)
    assert find(index, content(5, 1, 2, group=1)) == 0
    assert find(index, content(5, 1, 3)) == 0
    assert np.flatnonzero(index.is_indexed).tolist() == [5]


@pytest.mark.parametrize(
    "changes", [{"token_ids": tokens(1, 3)}, {"parent_hash": root_hash("b", "")}, {"media": b"cat"}]
)
def test_lookup_compares_the_content_if_hashes_collide(changes):
    page = content(5, 1, 2)
    assert find(index_of(page), page, **changes) == 0


def test_the_first_page_with_a_hash_stays_indexed():
    first = content(3, 1, 2)
    index = index_of(first)
    assert not add(index, content(4, 1, 2))
    assert not add(index, content(3, 8, 9)), "a page is kept for one content"
    assert find(index, first) == 3
    assert index.indexed_pages() == [first]


def test_add_skips_null_pages_and_contents_without_a_hash():
    index = PrefixIndex(num_groups=2, num_pages=20)
    contents = [content(0, each, each).content for each in range(4)]
    contents[2] = (b"", *contents[2][1:])  # a token is not known
    assert index.add(1, [7, 0, 8, 9], contents) == [7, 9]
    assert [(page.page, page.group, page.content) for page in index.indexed_pages()] == [
        (7, 1, contents[0]),
        (9, 1, contents[3]),
    ]


def test_a_partial_page_is_not_indexed_twice():
    index = index_of(content(3, 1, 2, full=False))
    assert not add(index, content(4, 1, 2, full=False))
    assert not add(index, content(4, 1, full=False)), "page 3 begins with it"
    assert add(index, content(4, 1, 2, 3, full=False))


def test_remove_leaves_nothing_in_the_index():
    page, partial = content(3, 1, 2), content(4, 5, full=False)
    index = index_of(page, partial)
    assert [index.group_and_hash(3), index.group_and_hash(4)] == [(0, page.hash), (0, b"")]
    index.remove([4, 3])
    assert find(index, page) == 0
    assert index.lookup_partial(0, ROOT, tokens(1)) == index.lookup_partial(0, ROOT, tokens(5)) == (0, 0)
    assert not index.is_indexed.any()
    assert add(index, content(4, 1, 2)), "another may hold it now"


def test_partial_lookup_finds_the_longest_common_prefix():
    index = index_of(content(5, 1, full=False), content(3, 1, 2, 3, full=False), content(4, 1, 2, 7, 8))
    assert index.lookup_partial(0, ROOT, tokens(1, 2, 7, 9)) == (4, 3)
    assert index.lookup_partial(0, ROOT, tokens(1, 2, 3)) == (3, 3)
    assert index.lookup_partial(0, ROOT, tokens(1, 5)) in [(page, 1) for page in (3, 4, 5)]
    assert index.lookup_partial(0, ROOT, tokens(2)) == (0, 0)
    assert index.lookup_partial(0, root_hash("b", ""), tokens(1)) == (0, 0)
    assert index.lookup_partial(1, ROOT, tokens(1)) == (0, 0)


def test_partial_lookup_skips_pages_with_media():
    assert index_of(content(3, 1, 2, media=b"cat")).lookup_partial(0, ROOT, tokens(1)) == (0, 0)


def test_partial_lookup_compares_only_the_newest_pages():
    many = [content(1 + each, 7, each, full=False) for each in range(PARTIAL_CANDIDATES + 1)]
    index = index_of(*many)
    assert index.lookup_partial(0, ROOT, tokens(7, 1)) == (2, 2)
    assert index.lookup_partial(0, ROOT, tokens(7, 0))[1] == 1, "the oldest is not looked at"


def test_cached_pages_come_in_the_order_in_which_they_were_added():
    pages = [content(9, 1, 2), content(2, 8, full=False), content(5, 3, 4)]
    index = index_of(*pages)
    assert index.indexed_pages() == pages
    index.remove([2])
    add(index, pages[1])
    assert index.indexed_pages() == [pages[0], pages[2], pages[1]]
