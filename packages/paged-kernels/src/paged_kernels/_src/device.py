"""The device that a computation is traced for."""

from typing import Any

import jax


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
