import re
import sys

import pytest

from paged_attn_layer._src.engine.completion import Completion
from paged_attn_layer._src.engine.progress import optional_module
from paged_attn_layer._src.engine.report import plot, summary
from paged_attn_layer._src.engine.stats import EngineStats, StepRecord


def step(prefill, decode, seconds, pages=3):
    mode = "decode" if not prefill else "mixed" if decode else "prefill"
    return StepRecord(
        mode=mode,
        prefill_tokens=prefill,
        cached_tokens=prefill // 2,
        decode_tokens=decode,
        new_tokens=decode,
        running=2,
        waiting=0,
        pages_used=pages,
        host_seconds=seconds / 4,
        device_seconds=seconds * 3 / 4,
    )


@pytest.fixture
def stats():
    return EngineStats([step(10, 0, 1.0), step(6, 2, 4.0, pages=7), step(0, 2, 1.0)], preemptions=1)


def test_a_mixed_step_is_shared_out_by_tokens(stats):
    assert stats.prefill_seconds == 1.0 + 3.0
    assert stats.prefill_rate == 16 / 4.0
    assert stats.decode_rate == 4 / 2.0
    assert stats.steps_by_mode == {"prefill": 1, "mixed": 1, "decode": 1}
    assert stats.peak_pages == 7
    assert stats.cached_tokens == 8
    assert (stats.host_microseconds, stats.device_microseconds) == (0.5e6, 1.5e6)


def test_an_engine_that_did_nothing_has_rates_of_zero():
    assert (EngineStats().prefill_rate, EngineStats().decode_rate, EngineStats().host_microseconds) == (0, 0, 0)


def test_the_summary_fits_the_terminal(stats, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    answer = Completion(text="word " * 40, token_ids=[1] * 40, finish_reason="length", prompt_tokens=5)
    text = summary(["two\nlines"], [answer], stats)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "two lines" in text
    assert text.count("word") == 40, "the answer is whole"
    assert re.search(r"^prefix +8 tokens +found in cached pages", text, re.MULTILINE)
    assert "after warm-up, which compiled 0" in text


def test_the_picture_is_written(stats, tmp_path):
    plot(stats, 40, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"needs tqdm, which is not installed; pip install 'paged-attn-layer\[generate\]'"
    ):
        optional_module("tqdm")
