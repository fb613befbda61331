import jax
import pytest
from kernel_data import SPECS, WORKLOADS, make_case

from paged_kernels import BACKENDS, paged_attention, resolve_backend, write_kv
from paged_kernels._src.backends import current_platform


def test_default_follows_the_platform(monkeypatch):
    assert resolve_backend(None) == "xla"
    monkeypatch.setattr("paged_kernels._src.backends.current_platform", lambda: "tpu")
    assert resolve_backend(None) == "tpu"
    assert resolve_backend("tpu") == "tpu"
    monkeypatch.setattr("paged_kernels._src.backends.current_platform", lambda: "cuda")
    assert resolve_backend(None) == "xla"


@pytest.mark.parametrize("backend", ["reference", "xla", "tpu_interpret"])
def test_others_run_anywhere(backend):
    assert resolve_backend(backend) == backend


def test_platform_is_the_default_device_s():
    assert current_platform() == "cpu"
    with jax.default_device(jax.devices("cpu")[3]):
        assert current_platform() == "cpu"
    with jax.default_device("cpu"):
        assert current_platform() == "cpu"


def test_platform_is_that_of_the_mesh_in_scope():
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert current_platform() == "cpu"


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match=f"backend='cuda' must be one of {', '.join(BACKENDS)}, or None"):
        resolve_backend("cuda")


def test_tpu_without_a_tpu_says_why_and_what_else():
    case = make_case(WORKLOADS["decode"])
    message = "backend='tpu' cannot run here: the platform is 'cpu'.*use backend='xla'"
    with pytest.raises(ValueError, match=message):
        paged_attention(case.q, case.pages, case.batch, SPECS["plain"], backend="tpu")
    k, v = case.new_rows(case.keys), case.new_rows(case.values)
    with pytest.raises(ValueError, match=message):
        write_kv(case.pages, k, v, case.batch, backend="tpu")
