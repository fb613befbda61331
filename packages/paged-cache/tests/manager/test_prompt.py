import hashlib

import numpy as np
import pytest

from paged_cache._src.manager import Media, Prompt


def test_a_prompt_is_told_apart_by_namespace_adapter_media_and_tokens():
    cat = Media(start=0, stop=1, digest=b"cat")
    prompts = [
        Prompt([1, 2]),
        Prompt([1, 3]),
        Prompt([1, 2], namespace="a"),
        Prompt([1, 2], adapter="a"),
        Prompt([1, 2], media=[cat]),
    ]
    assert len({prompt.prefix_hash(1, page_size=2) for prompt in prompts}) == len(prompts)


def test_media_may_be_listed_in_any_order():
    media = [Media(start=at, stop=at + 1, digest=b"cat") for at in (0, 1)]
    hashes = {Prompt([1, 2], media=each).prefix_hash(1, page_size=2) for each in (media, media[::-1])}
    assert len(hashes) == 1


def test_a_prompt_that_waits_is_hashed_once(monkeypatch):
    sha256, hashed = hashlib.sha256, []
    prompt = Prompt(range(10))
    monkeypatch.setattr(hashlib, "sha256", lambda data: hashed.append(data) or sha256(data))
    assert [len(prompt.prefix_hashes(n, page_size=4)) for n in (1, 2, 1, 2)] == [2, 3, 2, 3]
    assert len(hashed) == 2
    assert len(prompt.prefix_hashes(5, page_size=2)) == 6, "pages of another size have other hashes"
    assert (
        prompt.prefix_hashes(0, page_size=2)
        == prompt.prefix_hashes(0, page_size=4)
        == [prompt.prefix_hash(0, page_size=2)]
    )


def test_a_prompt_copies_its_token_ids():
    ids = np.arange(4, dtype=np.int32)
    prompt = Prompt(ids)
    ids[:] = 9
    assert prompt.token_ids.tolist() == [0, 1, 2, 3]
    hashes = prompt.prefix_hashes(1, page_size=2)
    hashes.clear()
    assert len(prompt.prefix_hashes(1, page_size=2)) == 2


def test_tokens_of_any_integer_type_are_alike():
    hashes = {
        Prompt(np.array([1, 2], dtype)).prefix_hash(1, page_size=2) for dtype in (np.int8, np.uint32, ">i4", np.int64)
    }
    assert hashes == {Prompt([1, 2]).prefix_hash(1, page_size=2)}


def test_a_prompt_is_made_of_tokens_or_is_one():
    prompt = Prompt([1, 2, 3])
    assert Prompt.of(prompt) is prompt
    assert len(Prompt.of([1, 2, 3])) == 3


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([], r"token_ids has shape \(0,\); it must be a list of at least one token id"),
        ([[1, 2]], r"token_ids has shape \(1, 2\); it must be a list"),
        (7, r"token_ids has shape \(\); it must be a list"),
        ([1.5], r"token_ids are float64; they must be whole numbers in 0 \.\. 2\*\*31 - 1"),
        ([3, -1], r"token_ids hold -1; each must lie in 0 .*; leave out token_ids that are not known yet"),
        ([2**31], r"token_ids hold 2147483648; each must lie in"),
    ],
)
def test_wrong_token_ids_are_refused(token_ids, message):
    with pytest.raises(ValueError, match=message):
        Prompt(token_ids)
