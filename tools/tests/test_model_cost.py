import pytest
from tpu_costing import model_cost
from tpu_costing.model_cost import GIB, ModelRun, lines, weight_cycles

RUN = ModelRun(model="tiny", topology="v5e:2x2", seqs=4, context=256, chunk=64, page_size=16)
STEP = {
    "devices": 4,
    "weights": {"experts": 8_000_000, "head": 1_000_000, "rest": 2_000_000},
    "weights_bytes": 4 * GIB,
    "experts_per_row": 0.125,
    "groups": 2,
    "attention": [],
    "pages_bytes": 100 * 2**20,
    "num_pages": 100,
    "in_place_bytes": 100 * 2**20,
    "temporary_bytes": GIB // 2,
    "collectives": {"all-reduce": (3, 2_000_000)},
}


def report(monkeypatch, **changes):
    monkeypatch.setattr(model_cost, "ask", lambda *_, **__: {**STEP, **changes})
    return "\n".join(lines(RUN, attention=False))


def test_pages_fit_into_what_weights_and_temporaries_leave(monkeypatch):
    pages = int((0.9 * 16 - 4 - 0.5) * 1024)  # of 1 MiB
    assert f"pages that fit into 90% of HBM: {pages:,} (at least {pages // 2 * 16:,} tokens)" in report(monkeypatch)


def test_collectives_and_copied_pages_are_told(monkeypatch):
    assert "pages in place; collectives: 3 all-reduce of 2.00 MB" in report(monkeypatch)
    assert "pages COPIED; collectives: none" in report(monkeypatch, in_place_bytes=0, collectives={})
    assert "collectives: unknown: libtpu cannot print this program" in report(monkeypatch, collectives=None)


def test_a_step_reads_and_multiplies_with_the_experts_that_its_rows_choose():
    decode, prefill = (weight_cycles(RUN, mode, STEP) for mode in ("decode", "prefill"))
    read = {"decode": 3e6 + 8e6 / 2, "prefill": 3e6 + 8e6}  # 4 rows choose an eighth each, 64 rows choose all
    assert decode["memory"] == pytest.approx(2 * read["decode"] / (0.82e12 / 1.5e9))
    assert prefill["memory"] == pytest.approx(2 * read["prefill"] / (0.82e12 / 1.5e9))
    assert decode["matrix"] == pytest.approx(2 * (4 * 3e6 + 4e6) / 131072)
    assert prefill["matrix"] == pytest.approx(2 * (64 * 3e6 + 1e6) / 131072, rel=1e-6)
