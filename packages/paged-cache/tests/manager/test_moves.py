import dataclasses

import numpy as np
import pytest
from managing import computed, new_manager, write

from paged_cache._src.manager import PageMoves
from paged_cache._src.manager.moves import MoveLog

DEVICE, HOST = [10, 11, 12, 13, 14], [20, 21, 22]


def log_of(*moves):
    log = MoveLog()
    for verb, source, target in moves:
        log.add(verb, np.array(source, np.int32), np.array(target, np.int32))
    return log


def listed(moves):
    """What a phase does, without what it does not do."""
    return {name: ids.tolist() for name, ids in vars(moves).items() if len(ids)}


def in_order(moves):
    """Device and host pages after moves that are done one at a time, in their order."""
    device, host = DEVICE.copy(), HOST.copy()
    for verb, sources, targets in moves:
        read = [0] * len(targets) if verb == "zero" else [(host if verb == "in" else device)[page] for page in sources]
        for page, value in zip(targets, read, strict=True):
            (host if verb == "out" else device)[page] = value
    return device, host


def in_phases(phases):
    """The same after phases, each of which reads all before it writes any."""
    device, host = np.array(DEVICE), np.array(HOST)
    for moves in phases:
        copied, gone, come = device[moves.copy_from], device[moves.out_from], host[moves.in_from]
        device[moves.copy_to], device[moves.zero], device[moves.in_to], host[moves.out_to] = copied, 0, come, gone
    return device.tolist(), host.tolist()


def test_nothing_to_do_is_no_phase():
    assert log_of(("copy", [], [])).take() == []


def test_moves_that_do_not_meet_are_one_phase():
    (moves,) = log_of(("copy", [1], [2]), ("out", [3], [1]), ("copy", [1], [4]), ("in", [2], [0])).take()
    assert listed(moves) == {
        "copy_from": [1, 1], "copy_to": [2, 4], "out_from": [3], "out_to": [1], "in_from": [2], "in_to": [0]
    }  # fmt: skip
    assert {ids.dtype for ids in vars(moves).values()} == {np.dtype(np.int32)}


def test_moves_are_taken_once():
    log = log_of(("zero", [], [1]))
    assert len(log.take()) == 1
    assert log.take() == []


@pytest.mark.parametrize(
    ("moves", "num_phases"),
    [
        ([("copy", [1], [2]), ("copy", [2], [3]), ("copy", [3], [4])], 3),  # a chain
        ([("copy", [2], [3]), ("copy", [1], [2])], 1),  # what is written was read before
        ([("copy", [1, 2], [3, 4]), ("copy", [3], [1])], 2),
        ([("out", [1], [0]), ("in", [0], [2])], 2),  # one host page, out and then in
        ([("in", [0], [1]), ("out", [2], [0])], 1),  # in, and then out again
        ([("in", [0], [1]), ("copy", [1], [2])], 2),
        ([("in", [1], [1]), ("out", [2], [2])], 1),  # pages of device and host are not the same
        ([("copy", [1], [2]), ("zero", [], [1])], 1),  # read, and then scrubbed
        ([("zero", [], [2]), ("copy", [1], [2])], 2),  # scrubbed, and then written
        ([("copy", [1], [2]), ("copy", [3], [2])], 2),  # written twice: the last counts
        ([("zero", [], [1]), ("copy", [2], [3]), ("out", [1], [0]), ("copy", [0], [1])], 2),
    ],
)
def test_phases_have_the_effect_of_the_moves_in_order(moves, num_phases):
    phases = log_of(*moves).take()
    assert len(phases) == num_phases
    assert in_phases(phases) == in_order(moves)


def test_random_moves_in_phases_have_the_effect_of_the_moves_in_order():
    draw = np.random.default_rng(0)
    for _ in range(100):
        moves = []
        for _ in range(draw.integers(1, 8)):
            verb = draw.choice(["copy", "zero", "out", "in"])
            n = draw.integers(1, 3)
            sources = draw.permutation(3 if verb == "in" else 5)[: n if verb != "zero" else 0].tolist()
            moves.append((verb, sources, draw.permutation(3 if verb == "out" else 5)[:n].tolist()))
        assert in_phases(log_of(*moves).take()) == in_order(moves)


def test_the_log_copies_its_arguments():
    target = np.array([3], np.int32)
    moves = PageMoves(**{field.name: target for field in dataclasses.fields(PageMoves)})
    with pytest.raises(dataclasses.FrozenInstanceError):
        moves.zero = target


def test_a_copy_of_a_copy_in_one_step_takes_two_phases():
    manager = new_manager(prefix_reuse=False)
    seq = computed(manager, [1, 2])
    (twin,) = manager.fork(seq)
    write(manager, twin, 1, [3])
    manager.fork(twin)
    write(manager, twin, 1, [4])
    assert [listed(moves) for moves in manager.take_moves()] == [
        {"copy_from": [1], "copy_to": [2]},
        {"copy_from": [2], "copy_to": [3]},
    ]
    assert manager.take_moves() == []


def test_out_and_in_of_one_host_page_in_one_step_takes_two_phases():
    manager = new_manager(num_host_pages=1)
    seq = computed(manager, [1, 2])
    manager.swap_out(seq)
    manager.swap_in(seq)
    out, back = manager.take_moves()
    assert listed(out) == {"out_from": [1], "out_to": [1]}
    assert listed(back) == {"in_from": [1], "in_to": [1]}
