import jax

from paged_kernels._src.device import current_platform


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
