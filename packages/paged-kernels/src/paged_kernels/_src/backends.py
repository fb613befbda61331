"""Which implementation runs: `reference` and `xla` anywhere, `tpu` where there is one."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

Backend = Literal["reference", "xla", "tpu", "tpu_interpret"]
"""`reference` defines correct; `xla` runs on every platform; `tpu` is the Pallas kernel; `tpu_interpret` is that
kernel in Pallas's TPU interpreter, on any platform: slow, with copies as late as the hardware allows and
uninitialised memory set to NaN, for tests and debugging."""

BACKENDS: tuple[str, ...] = get_args(Backend)


def device_in_scope() -> Any:  # jax.Device, or a mesh's AbstractDevice: both have a platform and a device_kind
    """The device that a computation traced here is for: the mesh's in scope, else the default one."""
    mesh_device = jax.sharding.get_abstract_mesh().abstract_device
    if mesh_device is not None:
        return mesh_device
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue] (set as jax is imported)
    return jax.devices(device)[0] if device is None or isinstance(device, str) else device


def current_platform() -> str:
    """The platform of the device in scope."""
    return device_in_scope().platform


def resolve_backend(backend: Backend | None) -> Backend:
    """The backend to run: the one asked for, or the platform's.

    Raises:
        ValueError: there is no backend of that name, or it cannot run on this platform.
    """
    platform = current_platform()
    if backend is None:
        return "tpu" if platform == "tpu" else "xla"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}, or None for the platform's")
    if backend == "tpu" and platform != "tpu":
        raise ValueError(
            f"backend='tpu' cannot run here: the platform is {platform!r}, and the kernel is compiled for TPUs only; "
            "use backend='xla', backend='tpu_interpret' to interpret the kernel, or None to let the platform decide"
        )
    return backend


def without_gradient(fn: Callable[..., Any], backend: Backend) -> Callable[..., Any]:
    """`fn`, except that a gradient through it is refused by the backend's name, not by an error from inside jax."""
    refusing = jax.custom_jvp(fn)

    @refusing.defjvp
    def refuse(primals, tangents):
        raise NotImplementedError(f"backend={backend!r} has no gradient; use backend='reference'")

    return refusing
