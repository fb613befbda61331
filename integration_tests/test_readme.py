"""The Python examples of the top-level README run unchanged."""

import pathlib
import re

import numpy as np
import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def examples():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def run(example):
    names = {}
    exec(compile(example, str(README), "exec"), names)
    return names


def test_attention_over_a_paged_cache(examples):
    names = run(examples[0])
    out, v, view = np.asarray(names["out"]), names["v"], names["view"]
    np.testing.assert_allclose(out[0], np.repeat(v[0], 4, axis=0), atol=1e-6)  # the first token sees only itself
    assert (np.abs(out[:21]).max(axis=(1, 2)) > 0).all()
    assert not out[21:].any()
    first, last = names["manager"].page_tables(names["seqs"][0])[0, 0, :2]
    np.testing.assert_array_equal(view.value_pages[:, first], np.swapaxes(v[:16], 0, 1))
    np.testing.assert_array_equal(view.value_pages[:, last, :4], np.swapaxes(v[16:20], 0, 1))


def test_a_whole_model(examples, gguf_path, monkeypatch, capsys):
    monkeypatch.chdir(gguf_path.parent)
    engine = run(examples[1])["engine"]
    assert "Paris" in capsys.readouterr().out
    assert engine.stats.compilations == 0
    assert all(len(example.splitlines()) <= 20 for example in examples)
