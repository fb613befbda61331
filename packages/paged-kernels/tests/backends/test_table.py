"""Which backend runs: the first of the platform's list that can, or the one that is named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_targets import TARGETS
from kernel_data import SPECS, WORKLOADS, assert_rows_close, attend_densely, make_case

from paged_kernels import explain_backends, get_backend, paged_attention, write_kv
from paged_kernels._src.backends.base import Backend
from paged_kernels._src.backends.table import backend_names, candidates, choose
from paged_kernels._src.call import Call
from paged_kernels._src.head_params import HeadParams

SPEC = SPECS["plain"]
FIRST_ON_CPU = "cpu" if TARGETS else "xla"


@pytest.fixture(scope="module")
def case():
    return make_case(WORKLOADS["decode"])


def on(platform, case, q_dtype="float32"):
    """What the case's attention is chosen by on a platform."""
    call = Call.of_attention(case.q.astype(q_dtype), case.pages, case.batch, SPEC, HeadParams())
    return dataclasses.replace(call, platform=platform)


@pytest.mark.parametrize(
    ("platform", "name"), [("cpu", FIRST_ON_CPU), ("gpu", "xla"), ("tpu", "tpu"), ("another", "xla")]
)
def test_each_platform_has_a_first_choice(case, platform, name):
    assert choose(candidates(None, platform), on(platform, case)).backend.name == name


def test_the_next_of_the_list_runs_what_the_first_cannot(case):
    assert choose(candidates(None, "tpu"), on("tpu", case, "float16")).backend.name == "xla"
    with pytest.raises(NotImplementedError, match="q has dtype float16; the TPU kernel has float32 and bfloat16"):
        choose(candidates("tpu", "tpu"), on("tpu", case, "float16"))


def test_a_call_that_none_can_take_says_why_each_cannot():
    with jax.enable_x64(True):
        case = make_case(WORKLOADS["decode"], dtype="float64")
        message = "q has dtype float64; the TPU kernel has .*; q has dtype float64; the xla backend computes in float32"
        with pytest.raises(NotImplementedError, match=message):
            choose(candidates(None, "tpu"), on("tpu", case, "float64"))


@pytest.mark.parametrize("name", backend_names())
def test_a_backend_is_one_hashable_value_in_a_file_of_its_name(name):
    backend = get_backend(name)
    assert backend.name == name
    assert get_backend(name) is backend
    assert get_backend(backend) is backend
    assert hash(backend) == hash(dataclasses.replace(backend))


def test_names():
    assert backend_names() == ("reference", "cpu", "xla", "tpu", "tpu_interpret")


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match=f"backend='cuda' must be one of {', '.join(backend_names())}, or None"):
        get_backend("cuda")


def test_tpu_without_a_tpu_says_why_and_what_else(case):
    message = "backend='tpu' cannot run here: the platform is 'cpu'.*use backend='xla'"
    with pytest.raises(ValueError, match=message):
        paged_attention(case.q, case.pages, case.batch, SPEC, backend="tpu")
    k, v = case.new_rows(case.keys), case.new_rows(case.values)
    with pytest.raises(ValueError, match=message):
        write_kv(case.pages, k, v, case.batch, backend="tpu")


def test_a_backend_may_be_given_as_a_value(case):
    backend = get_backend("xla").with_block_sizes(q_rows=3, kv_pages=1)
    out = paged_attention(case.q, case.pages, case.batch, SPEC, backend=backend)
    assert_rows_close(out, attend_densely(case, SPEC)[0], "float32")


@pytest.mark.parametrize("name", ["cpu", "xla", "tpu", "tpu_interpret"])
def test_block_sizes_are_the_backend_s(name):
    cut = get_backend(name).with_block_sizes(q_rows=16, kv_pages=2)
    assert cut != get_backend(name)
    assert (cut.name, cut.block_sizes.q_rows, cut.block_sizes.kv_pages) == (name, 16, 2)
    with pytest.raises(ValueError, match="kv_pages=0 must be at least 1"):
        get_backend(name).with_block_sizes(q_rows=16, kv_pages=0)


def test_the_reference_does_not_cut_the_work():
    assert get_backend("reference").with_block_sizes(q_rows=16, kv_pages=2) is get_backend("reference")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zeros(Backend):
    """A backend from outside this package: all that one must have."""

    name: str = "zeros"

    def fit_attention(self, call):
        if call.spec.soft_cap is not None:
            raise NotImplementedError("zeros have no soft_cap")

    def prepare_attention(self, batch, fitted):
        return None

    def attend(self, q, pages, prepared, head_params, *, return_lse):
        return jnp.zeros_like(q), None


def test_a_backend_of_one_s_own_runs_and_refuses(case):
    arguments = case.q, case.pages, case.batch
    assert not paged_attention(*arguments, SPEC, backend=Zeros()).any()
    with pytest.raises(NotImplementedError, match="zeros have no soft_cap"):
        paged_attention(*arguments, SPECS["cap"], backend=Zeros())
    k, v = case.new_rows(case.keys), case.new_rows(case.values)
    written, expected = (write_kv(case.pages, k, v, case.batch, backend=one) for one in (Zeros(), "xla"))
    np.testing.assert_array_equal(written.data, expected.data)


def test_eager_calls_compile_once(case):
    def attend():
        return paged_attention(case.q, case.pages, case.batch, SPEC, backend=Zeros(name="once"))

    attend()
    with jax.no_tracing():
        attend()


def test_explained(case):
    report = explain_backends(case.q, case.pages, case.batch, SPEC)
    assert (report.platform, report.runs) == ("cpu", FIRST_ON_CPU)
    assert {name for name, reason in report.why_not.items() if reason is None} == {
        "reference",
        FIRST_ON_CPU,
        "xla",
        "tpu_interpret",
    }
    assert "the platform is 'cpu'" in report.why_not["tpu"]
    assert str(report).splitlines()[:2] == [f"on cpu, backend=None runs {FIRST_ON_CPU}", "  reference: can"]
