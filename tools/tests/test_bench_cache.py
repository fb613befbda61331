import json
import sys

import bench_cache
import pytest
from cache_costing import workloads
from cache_costing.peer import Peer, PeerError
from cache_costing.workloads import DEFAULT, PAGE_SIZE, Laps, Workload

TOY = ("decode-4x256-p200", "admit-64-p50", "hit-64-p50", "churn-64-p20", "fork-64-p50", "swap-64-p50")
PEER = """
import json, sys
print(json.dumps({"version": "9", "kinds": ["decode", "admit"]}), flush=True)
for line in sys.stdin:
    question = json.loads(line)
    if question == {"prepare": "admit-32-p9"}:
        raise ValueError("no pages left")
    print(json.dumps({"extend": 2.0, "transfer": 1.0} if "turn" in question else {}), flush=True)
"""


def fake_peer(tmp_path):
    path = tmp_path / "peer.py"
    path.write_text(PEER)
    return Peer([sys.executable, str(path)])


@pytest.mark.parametrize("name", [*DEFAULT, *TOY])
def test_names_are_read_as_they_are_written(name):
    assert Workload.parse(name).name == name


@pytest.mark.parametrize("name", ["decode-2048-p100", "admit-4x64-p100", "release-64-p100", "admit-64"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="must be named decode-SEQSxTOKENS-pPAGES"):
        Workload.parse(name)


def test_running_sequences_are_spread_over_a_page_and_have_room_for_their_turns():
    work = Workload.parse("decode-32x256-p1000")
    lengths = [len(work.running(number)) for number in range(32)]
    assert {length % PAGE_SIZE for length in lengths} == set(range(PAGE_SIZE))
    assert max(lengths) + work.most_turns * 2 * work.times <= work.tokens


def test_laps_leave_out_what_has_no_name():
    laps = Laps()
    laps("a")
    laps()
    laps("b")
    laps("a")
    assert set(laps.over(2)) == {"a", "b"}


def test_a_run_prints_a_row_a_workload_and_says_that_the_peer_is_missing(monkeypatch, tmp_path, capsys):
    out = tmp_path / "figures.json"
    arguments = ["--workload", *TOY, "--repeats", "1", "--peer-python", str(tmp_path / "none"), "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_cache.py", *arguments])
    monkeypatch.setattr(bench_cache, "COPY_BYTES", 2**12)
    monkeypatch.setattr(workloads, "PAGES_A_TURN", 8)
    bench_cache.main()
    printed = capsys.readouterr()
    figures = json.loads(out.read_text())
    assert [row["workload"] for row in figures["rows"]] == list(TOY)
    assert all(row["us"]["ours"] > 0 and row["vllm_over_ours"] is None for row in figures["rows"])
    assert set(figures["rows"][0]["parts"]["ours"]) == {"extend", "metadata", "transfer", "commit"}
    assert figures["rows"][0]["limit_us"] > 0
    assert "vLLM skipped" in printed.err
    assert "vLLM skipped" in printed.out
    assert all(name in printed.out for name in TOY)


def test_the_peer_takes_turns_where_it_has_the_operation(tmp_path, monkeypatch):
    monkeypatch.setattr(workloads, "PAGES_A_TURN", 8)
    peer, limits = fake_peer(tmp_path), bench_cache.Limits(copy_gb_per_s=1.0, hash_us=1.0)
    admit, fork = (bench_cache.bench(Workload.parse(name), peer, 1, limits) for name in ("admit-64-p50", "fork-64-p50"))
    peer.close()
    assert admit["us"]["vllm"] == 2e6
    assert admit["vllm_over_ours"] == pytest.approx(2e6 / admit["us"]["ours"])
    assert "vllm" not in fork["us"]


def test_a_peer_that_fails_says_why(tmp_path):
    peer = fake_peer(tmp_path)
    with pytest.raises(PeerError, match="ValueError: no pages left"):
        peer.prepare(Workload.parse("admit-32-p9"))
    peer.close()
    with pytest.raises(PeerError, match="No module named"):
        Peer([sys.executable, "-m", "cache_costing.no_such_module"])


def test_more_turns_than_the_sequences_have_room_for_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_cache.py", "--workload", "decode-4x64-p100"])
    with pytest.raises(SystemExit):
        bench_cache.main()
    assert "--repeats 11 must be at most 0 for decode-4x64-p100" in capsys.readouterr().err
