from jax.experimental.pallas import tpu as pltpu

from paged_kernels._src.tpu.registers import INTERPRET, cdiv, interpreter, round_up


def test_the_interpreter_is_at_its_strictest():
    assert isinstance(INTERPRET, pltpu.InterpretParams)
    assert INTERPRET.dma_execution_mode == "on_wait"
    assert INTERPRET.out_of_bounds_reads == "raise"
    assert INTERPRET.uninitialized_memory == "nan"


def test_true_stands_for_the_strictest_interpreter():
    eager = pltpu.InterpretParams(dma_execution_mode="eager")
    assert interpreter(True) is INTERPRET
    assert interpreter(False) is False
    assert interpreter(eager) is eager


def test_rounding_up():
    assert [cdiv(a, 4) for a in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [round_up(a, 4) for a in (0, 1, 4, 5)] == [0, 4, 4, 8]
