import json

import pytest
from tpu_costing import report
from tpu_costing.measure import Result, why_void
from tpu_costing.profile import Figures
from tpu_costing.workloads import Workload


def result(kernel, cycles, failure=None, blocks="default", limit=10.0):
    figures = Figures(cycles=cycles, bundles=cycles / 2, operations={"dma": 1.0, "scalar": 2.0}, path={"dma": cycles})
    return Result(
        workload="decode-8-1-128-p16-c8192",
        chip="v6e",
        kernel=kernel,
        blocks=blocks,
        unit="page",
        tokens=16,
        limit=limit,
        figures=figures,
        failure=failure,
    )


def test_geometric_mean():
    assert report.geometric_mean([0.25, 4.0, 8.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="at least one"):
        report.geometric_mean([])


def test_what_counts_is_never_below_the_limit():
    assert result("ours", 7.0).cycles == 10
    assert result("ours", 15.0).ratio == 1.5


def test_ratio_is_to_the_better_peer_that_compiles():
    group = [result("ours", 7.0), result("jax paged", 40.0), result("jax ragged", 20.0), result("jax ragged", 0, "no")]
    assert report.ratio_to_peers(group) == 0.5
    assert report.ratio_to_peers(group[:1]) is None
    assert report.ratio_to_peers([result("ours", 0, "no"), *group[1:]]) is None


def test_a_kernel_is_shown_at_its_best_blocks():
    group = [result("ours", 7.0), *(result("jax paged", c, blocks=b) for c, b in ((40.0, "1x32"), (30.0, "1x64")))]
    assert [(r.kernel, r.blocks) for r in report.best_by_kernel(group)] == [("ours", "default"), ("jax paged", "1x64")]


def test_lines():
    ours, peer = result("ours", 15.0), result("jax paged", 30.0)
    assert report.line(peer, ours).split()[-1] == "0.50"
    assert "fails: head size unaligned" in report.line(result("jax paged", 0, "head size unaligned"), ours)
    assert report.account(ours) == "    critical path: dma 15.0\n    operations: scalar 2.0, dma 1.0"


def test_last_line_counts_only_what_compares():
    groups = [[result("ours", 10.0), result("jax paged", 40.0)], [result("ours", 10.0), result("jax paged", 0, "no")]]
    assert report.last_line(groups).endswith("over 1 of 2: 0.250")
    assert report.last_line(groups[1:]).startswith("no workload")


def test_markdown_puts_the_kernels_side_by_side():
    groups = [
        [result("ours", 15.0), result("jax paged", 0, "head size unaligned"), result("jax ragged", 30.0)],
        [result("ours", 7.0), result("jax ragged", 20.0)],
    ]
    assert report.markdown(groups).splitlines() == [
        "| workload | chip | ours | limit | bundles | spills | jax paged | jax ragged | ours / better |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| `decode-8-1-128-p16-c8192` | v6e | 15 | 10 | 8 | 0.0 | head size unaligned | 30 | 0.50 |",
        "| `decode-8-1-128-p16-c8192` | v6e | 7 | 10 | 4 | 0.0 | – | 20 | 0.50 |",
    ]
    assert report.markdown([[result("ours", 7.0)]]).splitlines()[2] == (
        "| `decode-8-1-128-p16-c8192` | v6e | 7 | 10 | 4 | 0.0 |"
    )


def test_json_holds_what_counts(tmp_path):
    report.write_json(tmp_path / "cost.json", [[result("ours", 7.0)]])
    written = json.loads((tmp_path / "cost.json").read_text())
    assert written["estimated"] is True
    assert written["results"][0]["counts"] == 10.0


def test_figures_are_void_unless_the_keys_are_read_once():
    workload = Workload.parse("decode-8-1-128")
    assert why_void(workload, Figures(bytes_read=workload.page_bytes), ours=True) is None
    assert why_void(workload, Figures(bytes_read=0.5 * workload.page_bytes), ours=True).startswith("void: 0.50 of")
    assert why_void(workload, Figures(dmas_of_any_size=1), ours=True) is None
    assert why_void(workload, Figures(bytes_read=2 * workload.page_bytes), ours=True).startswith("void: 2.00 times")
    assert why_void(workload, Figures(bytes_read=2 * workload.page_bytes), ours=False) is None
