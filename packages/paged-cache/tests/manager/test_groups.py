import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from managing import computed, new_manager, refused, table, write

from paged_cache._src.manager import KVShape, LayerGroup, Media, Prompt

FULL, WINDOW, CHUNKED, CROSS = LayerGroup.full(), LayerGroup.window(5), LayerGroup.chunked(6), LayerGroup.cross()


def seen(group, position):
    """What a query at `position` sees, written out from the definitions."""
    return {
        "full": range(position + 1),
        "window": range(max(0, position - group.tokens + 1), position + 1),
        "chunked": range(position // max(group.tokens, 1) * group.tokens, position + 1),
    }[group.kind]


@pytest.mark.parametrize("group", [FULL, WINDOW, CHUNKED, LayerGroup.window(1), LayerGroup.chunked(1)], ids=str)
def test_first_needed_is_the_first_key_that_this_or_a_later_query_sees(group):
    needed = [min(min(seen(group, later)) for later in range(done, 40)) for done in range(20)]
    assert [group.first_needed(done) for done in range(20)] == needed
    assert group.first_needed(np.arange(20, dtype=np.int32)).tolist() == needed


def test_properties_of_each_kind_of_group():
    assert LayerGroup.window(4, layers=[0, 2]) == LayerGroup(kind="window", tokens=4, layers=(0, 2))
    assert [group.is_self_attention for group in (FULL, WINDOW, CHUNKED, CROSS)] == [True, True, True, False]
    assert [group.is_windowed for group in (FULL, WINDOW, CHUNKED, CROSS)] == [False, True, True, False]


@pytest.mark.parametrize(
    ("kind", "tokens", "message"),
    [
        ("local", 3, "kind='local' must be 'full', 'window', 'chunked' or 'cross'"),
        ("window", 0, "tokens=0 must be at least 1 for kind='window'"),
        ("chunked", -2, "tokens=-2 must be at least 1 for kind='chunked'"),
        ("full", 4, "tokens=4 must be 0 for kind='full'"),
        ("cross", -1, "tokens=-1 must be 0 for kind='cross'"),
    ],
)
def test_a_group_that_cannot_be_is_refused(kind, tokens, message):
    with pytest.raises(ValueError, match=message):
        LayerGroup(kind=kind, tokens=tokens)


@pytest.mark.parametrize("group", [WINDOW, CHUNKED, LayerGroup.window(1)], ids=str)
def test_pages_are_released_once_no_query_can_see_them(group):
    manager = new_manager(groups=(FULL, group), page_size=2, max_sequence_length=24, prefix_reuse=False)
    seq = computed(manager, [0])
    for done in range(1, 24):
        first = group.first_needed(done) // 2
        held = table(manager, seq, group=1)
        assert [at for at, page in enumerate(held) if page] == list(range(first, -(-done // 2)))
        assert len(table(manager, seq)) == -(-done // 2), "the other group keeps all"
        assert manager.num_used == -(-done // 2) * 2 - first
        write(manager, seq, 1, [done])


def test_a_prompt_that_is_longer_than_the_window_leaves_only_the_window():
    manager = new_manager(groups=(WINDOW,))
    seq = computed(manager, range(17))  # the next query sees 13 .. 17
    assert [page > 0 for page in table(manager, seq)] == [False, False, False, True, True]
    assert manager.num_used == 2
    manager.release(seq)
    assert manager.num_used == 0


def test_groups_take_their_pages_from_one_pool():
    manager = new_manager(groups=(FULL, WINDOW, CHUNKED))
    seq = manager.admit(range(9))
    pages = [page for group in range(3) for page in table(manager, seq, group)]
    assert sorted(pages) == list(range(1, 10))


def test_cross_attention_without_a_digest_is_not_cached():
    manager = new_manager(groups=(FULL, CROSS))
    manager.release(computed(manager, range(9), cross_tokens=5))
    assert manager.indexed_pages() == []


def test_cross_attention_has_pages_for_the_other_text_alone():
    manager = new_manager(groups=(FULL, CROSS))
    seq = computed(manager, range(5), cross_tokens=9)
    assert [len(table(manager, seq, group)) for group in (0, 1)] == [2, 3]
    write(manager, seq, 4, range(4))
    assert [len(table(manager, seq, group)) for group in (0, 1)] == [3, 3]
    (twin,) = manager.fork(seq)
    assert table(manager, twin, 1) == table(manager, seq, 1)
    assert manager.cross_tokens([twin, seq]).tolist() == [9, 9]
    manager.truncate(seq, 0)
    assert len(table(manager, seq, 1)) == 3
    manager.release([seq, twin])
    assert manager.num_used == 0


@pytest.mark.parametrize(
    ("groups", "cross_tokens", "message"),
    [
        ((FULL, CROSS), 0, "cross_tokens=0 must be a whole number of at least 1"),
        ((FULL, CROSS), -3, "cross_tokens=-3 must be a whole number of at least 1"),
        ((FULL,), 3, "cross_tokens=3 must be 0: there is no cross-attention group"),
        ((FULL, CROSS), 33, "a sequence of 33 tokens is longer than max_sequence_length=32"),
    ],
)
def test_tokens_for_cross_attention_must_fit_the_groups(groups, cross_tokens, message):
    manager = new_manager(groups=groups)
    for ask in (manager.admit, manager.pages_to_admit):
        with refused(manager, ValueError, message):
            ask([1], cross_tokens=cross_tokens)


def test_a_manager_needs_a_self_attention_group():
    with pytest.raises(ValueError, match=r"groups=.*cross.* must have a self-attention group: full, window or chunked"):
        new_manager(groups=(CROSS,))


def test_truncating_behind_pages_that_a_window_has_released_is_refused():
    manager = new_manager(groups=(FULL, WINDOW))
    seq = computed(manager, range(14))  # the next query sees 10 .. 14, so pages 0 and 1 are gone
    with refused(
        manager, ValueError, r"num_tokens=11 is too far back: window layers have released all pages before token 8"
    ):
        manager.truncate(seq, 11)
    manager.truncate(seq, 12)  # whose query sees 8 .. 12
    write(manager, seq, 2, [1, 2])
    assert manager.lengths(seq) == 14


def test_tokens_that_were_never_committed_can_be_truncated_whatever_the_window():
    manager = new_manager(groups=(WINDOW,))
    seq = computed(manager, range(14))
    manager.extend(seq, 6)
    manager.truncate(seq, 14)
    assert len(table(manager, seq)) == 4


def test_only_prompts_with_the_same_digest_of_the_other_text_share_pages():
    manager = new_manager(groups=(FULL, CROSS))

    def prompt(digest):
        return Prompt(range(12), media=[Media(start=0, stop=1, digest=digest)] if digest else ())

    for digest in (b"", b"hello"):
        manager.release(computed(manager, prompt(digest), cross_tokens=4))
    assert [manager.cached_tokens(prompt(digest)) for digest in (b"", b"hello", b"bonjour")] == [0, 11, 0]


forgetting = st.builds(LayerGroup.window, st.integers(1, 20)) | st.builds(LayerGroup.chunked, st.integers(1, 20))
any_group = st.just(FULL) | forgetting


def most_pages_by_count(group, length, new_tokens, page_size):
    """The most pages of a sequence, by going through every step that it can make."""
    return max(
        -(-(computed + new) // page_size) - group.first_needed(computed) // page_size
        for computed in range(length)
        for new in range(1, min(new_tokens, length - computed) + 1)
    )


@given(group=any_group, length=st.integers(1, 120), new_tokens=st.integers(1, 20), page_size=st.integers(1, 10))
def test_no_sequence_holds_more_than_the_most_pages(group, length, new_tokens, page_size):
    most = group.most_pages(length, new_tokens, page_size)
    assert most_pages_by_count(group, length, new_tokens, page_size) <= most
    assert group.most_pages(np.array([length, 1]), new_tokens, page_size).tolist() == [most, 1]


@pytest.mark.parametrize("group", [FULL, *(f(n) for n in (1, 4, 6) for f in (LayerGroup.window, LayerGroup.chunked))])
@pytest.mark.parametrize("new_tokens", [1, 2, 7])
@pytest.mark.parametrize("page_size", [1, 4, 5])
def test_a_long_sequence_holds_the_most_pages(group, new_tokens, page_size):
    length = 60  # long enough for every place in a page to come
    assert group.most_pages(length, new_tokens, page_size) == most_pages_by_count(group, length, new_tokens, page_size)


def test_a_shape_has_one_spelling():
    assert KVShape(num_kv_heads=2, head_dim=8, v_head_dim=8) == KVShape(num_kv_heads=2, head_dim=8)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_kv_heads": 0}, "num_kv_heads=0 must be a whole number of at least 1"),
        ({"num_kv_heads": True}, "num_kv_heads=True must be a whole number"),
        ({"head_dim": 8.0}, r"head_dim=8\.0 must be a whole number"),
        ({"v_head_dim": -1}, "v_head_dim=-1 must be a whole number"),
        ({"v_head_dim": 9, "latent": True}, "v_head_dim=9 must be at most head_dim=8: a latent value is the start of"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        KVShape(**{"num_kv_heads": 1, "head_dim": 8} | sizes)
