import pytest
from tpu_costing.workloads import GROUPS, Workload, choose


@pytest.mark.parametrize("name", [name for names in GROUPS.values() for name in names])
def test_base_set_is_named_by_itself(name):
    assert Workload.parse(name).name == name


def test_name_says_everything():
    workload = Workload.parse("mixed-64-8-256-p32-n2048-c512-w128-int8")
    assert workload == Workload(
        mode="mixed",
        q_heads=64,
        kv_heads=8,
        head_dim=256,
        page_size=32,
        new_tokens=2048,
        context=512,
        window=128,
        dtype="int8",
    )
    assert workload.name == "mixed-64-8-256-p32-n2048-c512-w128-int8"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("decode", "must be MODE-QHEADS"),
        ("decode-32-8-128-16p", "must be MODE-QHEADS"),
        ("encode-32-8-128", "mode='encode' must be one of decode, prefill, mixed, write"),
        ("decode-32-8-128-int7", "dtype='int7' must be one of bfloat16"),
        ("decode-8-3-128", "q_heads=8 must be a multiple of kv_heads=3"),
        ("decode-8-1-128-p64-c100", "context=100 must be a multiple of page_size=64"),
    ],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        Workload.parse(name)


def test_choose_takes_names_and_groups_once_and_all_for_none():
    assert [w.name for w in choose(["write", "write-8-128"])] == ["write-8-128-p16", "write-1-128-p16"]
    assert len(choose([])) == sum(len(names) for names in GROUPS.values())


def test_long_context_is_one_sequence_of_two_lengths():
    workload = Workload.parse("decode-8-1-128-p16-c8192")
    assert workload.batches == ([(4096, 1)], [(20480, 1)])
    assert workload.units == 1024
    assert workload.unit == "page"


def test_short_context_is_many_sequences():
    workload = Workload.parse("decode-8-1-128-p16-c512")
    assert [len(batch) for batch in workload.batches] == [16, 32]
    assert workload.units == 16 * 32


def test_window_counts_its_own_pages_whatever_the_context():
    workload = Workload.parse("decode-8-1-128-p16-c8192-w1024")
    assert workload.batches[0] == [(8192, 1)] * 8
    assert workload.units == 8 * 64


def test_prefill_is_one_call():
    workload = Workload.parse("prefill-8-1-128-p16-n4-c32")
    assert (workload.unit, workload.units, workload.batches) == ("call", 1, ([(36, 4)],))
    assert workload.flops() == 4 * 8 * 128 * (33 + 34 + 35 + 36)
    assert workload.bytes_needed() == 3 * 2 * 128 * 16 * 2


def test_heads_take_whole_matrix_units():
    workload = Workload.parse("prefill-8-1-64-p16-n4-c32")
    assert [workload.flops(width) / workload.flops() for width in (1, 64, 128, 256)] == [1, 1, 2, 4]


def test_mixed_is_decode_beside_a_chunk():
    workload = Workload.parse("mixed-8-1-128-p16-n4-c32")
    assert workload.batches == ([(32, 1)] * 16 + [(36, 4)],)
    assert workload.flops() == 4 * 8 * 128 * (16 * 32 + 33 + 34 + 35 + 36)


def test_window_bounds_the_work_of_prefill():
    assert Workload.parse("prefill-1-1-128-p16-n4-c32-w2").flops() == 4 * 128 * 4 * 2


def test_write_moves_a_tile_and_a_row():
    workload = Workload.parse("write-8-128")
    assert (workload.unit, workload.units) == ("row", 32)
    assert workload.bytes_needed() == 2 * 8 * 128 * 2 * 9


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("decode-8-1-128-p32", 32), ("write-8-128", 1), ("prefill-8-1-128-n4-c32", 4), ("mixed-8-1-128-n4-c32", 20)],
)
def test_tokens_of_a_unit(name, tokens):
    assert Workload.parse(name).tokens == tokens


def test_page_bytes_follow_the_type():
    assert Workload.parse("decode-32-8-128").page_bytes == 65536
    assert Workload.parse("decode-32-8-128-p32-int8").page_bytes == 65536
