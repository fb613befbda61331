from paged_kernels._src.tpu.interpreter import INTERPRET


def test_the_interpreter_is_at_its_strictest():
    assert INTERPRET.dma_execution_mode == "on_wait"
    assert INTERPRET.out_of_bounds_reads == "raise"
    assert INTERPRET.uninitialized_memory == "nan"
