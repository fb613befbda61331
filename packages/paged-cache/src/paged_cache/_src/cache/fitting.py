"""How many bytes a device has for pages, and how many pages fit into them."""

import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

HOST_MEMORY_FRACTION = 1 / 8
"""Share of the host's memory that a cache may take where devices report none (CPU): the model and others live there
too, and inside a container the limit may be lower than what the host has."""

MIN_PAGES = 2
"""The null page and one that can be used."""


def fitting_pages(
    bytes_per_page: int, of_use: int, mesh: Mesh | None, utilization: float, byte_budget: int | None
) -> int:
    """Pages that fit into each device; no more than are of use where devices do not report their memory.

    Args:
        bytes_per_page: bytes of a page on one device, in all views.
        of_use: pages that all sequences of full length have, and the null page.
        mesh: the devices; `None` for the default one.
        utilization: share of a device's memory to fill, with what is in use already.
        byte_budget: bytes of each device for pages; `None`: what its memory has left.

    Raises:
        ValueError: not even `MIN_PAGES` fit.
    """
    most = None
    if byte_budget is not None:
        available, source = byte_budget, "byte_budget"
    elif (available := _device_bytes(mesh, utilization)) is not None:
        source = f"device memory at hbm_utilization={utilization}, less what is in use"
    else:
        available, source = _host_bytes(mesh, utilization), "the share of host memory"
        most = max(MIN_PAGES, of_use)
    available = _least_of_processes(available, mesh)
    pages = available // bytes_per_page
    if pages < MIN_PAGES:
        raise ValueError(
            f"no page fits: the null page and one more need {MIN_PAGES * bytes_per_page:,} bytes a device, but "
            f"{max(0, available):,} are available ({source}); "
            "use a smaller page_size, raise the budget, or split heads over more devices"
        )
    return pages if most is None else min(pages, most)


def check_num_pages(num_pages: int, bytes_per_page: int, mesh: Mesh | None) -> None:
    """Check that a device could hold so many pages if nothing else were in its memory.

    Args:
        num_pages: pages, the null page included.
        bytes_per_page: bytes of a page on one device, in all views.
        mesh: the devices; `None` for the default one.

    Raises:
        ValueError: they need more than all memory of a device.
    """
    needed, memory = num_pages * bytes_per_page, _all_bytes(mesh)
    if memory is not None and needed > memory:
        raise ValueError(
            f"num_pages={num_pages} needs {needed:,} bytes a device, which has {memory:,}; "
            f"it must be at most {memory // bytes_per_page}: use fewer pages, or leave it out to take what fits"
        )


def _least_of_processes(number: int, mesh: Mesh | None) -> int:
    """The least of what all processes of the mesh say, which have to allocate alike; each of them must call this."""
    if mesh is None or len(mesh.local_devices) == mesh.size:
        return number
    mine = np.frombuffer(np.int64(number).tobytes(), np.uint8)[None]  # as bytes: jax has no int64 by default
    per_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    each = jax.make_array_from_callback((mesh.size, 8), per_device, lambda _: mine)
    everywhere = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(each)
    return int(np.asarray(everywhere).view(np.int64).min())


def _devices(mesh: Mesh | None) -> list[Any]:
    """This process's devices of the mesh; the default one without a mesh."""
    return jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)


def _device_bytes(mesh: Mesh | None, utilization: float) -> int | None:
    """Bytes that the fullest device still has for pages; `None` where devices do not report their memory."""
    stats = [device.memory_stats() for device in _devices(mesh)]
    if not all(one and "bytes_limit" in one for one in stats):
        return None
    return min(int(one["bytes_limit"] * utilization) - one.get("bytes_in_use", 0) for one in stats)


def _host_bytes(mesh: Mesh | None, utilization: float) -> int:
    """Each device's part of `HOST_MEMORY_FRACTION` of the host's memory."""
    memory = _host_memory()
    if memory is None:
        raise ValueError(
            "neither the devices nor the operating system report their memory, so the page count cannot be derived; "
            "give num_pages or byte_budget"
        )
    return int(memory * HOST_MEMORY_FRACTION * utilization) // len(_devices(mesh))


def _host_memory() -> int | None:
    """Bytes of the host's memory; `None` where the operating system does not say."""
    names = getattr(os, "sysconf_names", {})  # Windows has none
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _all_bytes(mesh: Mesh | None) -> int | None:
    """All memory of the smallest device, in use or not; `None` where nothing reports it."""
    devices = _devices(mesh)
    stats = [device.memory_stats() for device in devices]
    if all(one and "bytes_limit" in one for one in stats):
        return min(one["bytes_limit"] for one in stats)
    memory = _host_memory()
    return None if memory is None else memory // len(devices)
