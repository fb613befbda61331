import sys

import numpy as np
import pytest
from tiny_checkpoints import CONFIG, random_weights

from paged_attn_layer import load_model
from paged_attn_layer._src.convert.progress import HostMemory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how high a process's memory was")
def test_memory_that_was_given_back_counts():
    memory = HostMemory()
    block = np.ones(40 << 20, np.uint8)
    del block
    assert 38 << 20 < memory.rise() < 200 << 20
    assert HostMemory().rise() < 20 << 20, "only what came after the start"


def test_where_the_system_does_not_say(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert HostMemory().rise() is None


def test_a_bar_with_bytes_and_rate(capsys):
    load_model(random_weights(), config=CONFIG)
    assert capsys.readouterr().err == ""
    load_model(random_weights(), config=CONFIG, progress=True)
    said = capsys.readouterr().err
    assert "loading: 100%" in said
    assert "19.8k/19.8k" in said
    assert "B/s" in said
