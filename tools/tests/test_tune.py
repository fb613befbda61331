import json

import pytest
import tune
from tpu_costing.calls import Contestant
from tpu_costing.workloads import Workload

from paged_kernels._src.tpu.tuning.lookup import Entry

DECODE = Workload.parse("decode-8-1-128-p16-c2048")


def test_entries_are_written_where_the_package_reads_them():
    assert {path.stem for path in tune.DATA.glob("*.json")} >= {"v5e", "v6e", "tpu7x"}


def test_candidates_are_the_keys_that_the_context_has():
    assert [c.kv_pages for c in tune.candidates(DECODE)] == [16, 32, 64, 128]
    assert {c.q_rows for c in tune.candidates(DECODE)} == {1}


def test_prefill_tries_rows_too():
    found = tune.candidates(Workload.parse("prefill-8-1-128-p64-n32-c128"))
    assert {(c.q_rows, c.kv_pages) for c in found} == {(16, 2), (32, 2)}


def test_a_shape_is_searched_once_at_its_longest():
    names = [f"decode-8-1-128-p16-c{context}" for context in (8192, 512)] + ["decode-8-1-64-p16-c512"]
    found = tune.tunable(map(Workload.parse, names))
    assert [w.name for w in found] == ["decode-8-1-128-p16-c8192", "decode-8-1-64-p16-c512"]


@pytest.mark.parametrize("name", ["write-8-128", "mixed-8-1-128-c64", "decode-8-1-128-w64"])
def test_workloads_without_their_own_block_sizes_are_refused(name):
    with pytest.raises(ValueError, match="must be decode or prefill"):
        tune.tunable([Workload.parse(name)])


def test_search_takes_the_cheapest_that_compiles():
    costs = {None: 30.0, 16: None, 32: 20.0, 64: 25.0, 128: 20.5}
    best = tune.search(tune.candidates(DECODE), lambda contestant: costs[contestant.kv_pages])
    assert (best.contestant.kv_pages, best.cost, best.default_cost) == (32, 20.0, 30.0)


def test_search_keeps_the_default_where_it_is_best():
    best = tune.search(tune.candidates(DECODE), lambda contestant: 10.0)
    assert (best.contestant, best.cost) == (tune.DEFAULT, 10.0)
    assert "best default, default 1.000 of it; tried: default 10.0, 1x16 10.0" in tune.line(DECODE, "v6e", best)


def test_search_needs_a_figure_of_the_default():
    best = tune.search(tune.candidates(DECODE), lambda contestant: 10.0 if contestant.kv_pages else None)
    assert best is None
    assert "no figure" in tune.line(DECODE, "v6e", best)


def test_written_entries_load_and_replace_their_shape(tmp_path):
    path = tmp_path / "v6e.json"
    other = Workload.parse("decode-8-1-64-p16-c2048")
    for workload, pages in ((DECODE, 64), (other, 32), (DECODE, 128)):
        contestant = Contestant(kernel="ours", q_rows=1, kv_pages=pages)
        best = tune.Best(contestant=contestant, cost=20.123, default_cost=30.0, tried=())
        tune.replace(path, tune.shape_of(workload), tune.entry_of(workload, best, how="estimated"))
    entries = [Entry.from_json(line) for line in json.loads(path.read_text())]
    assert [(e.workload, e.block_sizes.kv_pages, e.cost) for e in entries] == [
        ("decode-8-1-128-p16-c2048", 128, 20.12),
        ("decode-8-1-64-p16-c2048", 32, 20.12),
    ]
    tune.replace(path, tune.shape_of(DECODE), None)
    tune.replace(path, tune.shape_of(other), None)
    assert json.loads(path.read_text()) == []
