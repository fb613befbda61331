import pytest
from tpu_costing.child_process import ChildError, ask, in_three_words, last_error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("ValueError: slice must be divisible by 128", "head size unaligned"),
        ("jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem", "VMEM too small"),
        ("AssertionError", "an assertion fails"),
        ("(INTERNAL: LLO_CHECK failure (llo_region.cc:412) type_check_result", "a check inside the cost model fails"),
        ("NotImplementedError: decode only", "decode only"),
        ("NotImplementedError: pages has dtype int8; use xla", "NotImplementedError: pages has dtype int8; use xla"),
        ("KeyError: one two three four five six seven", "KeyError: one two three four five"),
    ],
)
def test_errors_come_down_to_a_few_words(error, words):
    assert in_three_words(error) == words


def test_last_error_is_the_last_exception_or_the_compilers_last_words():
    assert last_error("Traceback\nValueError: first\njax.errors.JaxRuntimeError: second\nnote") == (
        "jax.errors.JaxRuntimeError: second"
    )
    assert last_error("F1123 04:00:59 24880 x.cc:1] Static LLO profiling of k failed: why\n    @ 0x7f") == (
        "Static LLO profiling of k failed: why"
    )
    assert last_error("nothing known") == "nothing known"


def test_a_child_that_does_not_answer_is_an_error(monkeypatch):
    with pytest.raises(ChildError, match="--time needs an attached TPU"):
        ask("timing", {}, JAX_PLATFORMS="cpu")
