"""The device for which a computation is traced."""

from typing import Any

import jax


def device_in_scope() -> Any:  # a jax.Device or an AbstractDevice: both have `platform` and `device_kind`
    """Returns the device for which a computation is traced here: of the mesh in scope, or else the default device."""
    mesh_device = jax.sharding.get_abstract_mesh().abstract_device
    if mesh_device is not None:
        return mesh_device
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue] (set as jax is imported)
    return jax.devices(device)[0] if device is None or isinstance(device, str) else device


def current_platform() -> str:
    """Returns the platform of the device in scope."""
    return device_in_scope().platform
