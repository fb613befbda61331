import sys

import pytest
from managing import computed, ended, new_manager

from paged_cache._src.monitoring.history import PageHistory


def recorded(num_steps=8, num_pages=9, subscribe=True):
    """Ever longer sequences, one in each step, that end after it."""
    manager, history = new_manager(num_pages=num_pages, page_size=2, num_host_pages=9), PageHistory()
    if subscribe:
        manager.subscribe(history)
    for step in range(num_steps):
        seq = computed(manager, [step] * (1 + step))
        history.record(manager)
        manager.release(seq)
    return manager, history


def test_each_step_has_its_statistics_and_the_events_since_the_one_before():
    manager, history = recorded(num_steps=2)
    assert [stats.num_used for stats in history.steps] == [1, 1]
    ended(manager, range(50, 54))
    history.record(manager)
    assert history.events == [{}, {"stored": 2}, {"stored": 2}]
    assert (history.steps[-1].num_used, history.steps[-1].num_cached) == (0, 4)


def test_the_text_has_a_line_for_each_state_and_each_kind_of_event_that_happened():
    manager, history = recorded()
    names = [line.split()[0] for line in history.text().splitlines()]
    assert names == ["used", "cached", "empty", "stored", "evicted"]
    seq = computed(manager, [1])
    manager.swap_out(seq)
    manager.swap_in(seq)
    manager.reset_prefix_cache()
    history.record(manager)
    lines = history.text().splitlines()
    assert lines[0] == "used        ▁▁▂▂▃▃▄▄▁  1 of 8 pages, 4 at most"
    assert lines[-4:] == [
        "removed             █  7 pages",
        "evicted         ▂▆██▂  13 pages",
        "swapped out         █  1 page",
        "swapped in          █  1 page",
    ]


def test_without_a_subscription_there_are_states_alone():
    _, history = recorded(subscribe=False)
    assert [line.split()[0] for line in history.text().splitlines()] == ["used", "cached", "empty"]


def test_a_bar_is_a_part_of_all_pages_and_anything_is_seen():
    manager, history = new_manager(num_pages=101, page_size=1, max_sequence_length=100), PageHistory()
    for length in (1, 50, 100):
        seq = manager.admit(range(length))
        history.record(manager)
        manager.release(seq)
    used, _, empty = history.text().splitlines()
    assert used == "used   ▁▄█  100 of 100 pages, 100 at most"
    assert empty == "empty  █▄   0"


def test_many_steps_share_a_column():
    _, history = recorded(num_steps=16)
    wide, narrow = history.text().splitlines(), history.text(width=4).splitlines()
    assert [len(line) - len(short) for line, short in zip(wide, narrow, strict=True)] == [12] * len(wide)
    assert [line[24:] for line in wide] == [line[12:] for line in narrow]


def test_the_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    for subscribe in (True, False):
        recorded(subscribe=subscribe)[1].plot(tmp_path / "pages.png")
        assert (tmp_path / "pages.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = r"a picture needs matplotlib, which is not installed; pip install 'paged-cache\[plot\]', or print"
    with pytest.raises(ModuleNotFoundError, match=message):
        recorded()[1].plot(tmp_path / "pages.png")
    assert not list(tmp_path.iterdir())


def test_a_history_of_no_steps_is_refused(tmp_path):
    for show in (PageHistory().text, lambda: PageHistory().plot(tmp_path / "pages.png")):
        with pytest.raises(ValueError, match=r"no step was recorded; call record\(manager\) after each step"):
            show()
    assert not list(tmp_path.iterdir())
