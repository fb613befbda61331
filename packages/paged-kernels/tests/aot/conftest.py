"""The real TPU compiler: libtpu compiles for a chip that is not attached."""

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

# jax reads these when it is imported, and libtpu when it is loaded. So they come before the imports below.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

# With jax, a v4 chip is one device with two cores. Without this, libtpu describes single cores.
TOPOLOGIES: dict[str, dict[str, str]] = {
    "v4": {"topology_name": "v4:2x2x1", "chip_config_name": "megacore"},
    "v5e": {"topology_name": "v5e:2x2"},
    "v5p": {"topology_name": "v5p:2x2x1"},
    "v6e": {"topology_name": "v6e:2x2"},
    "tpu7x": {"topology_name": "tpu7x:2x2x1"},
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A chip to compile for.

    Arguments are pytrees of `jax.ShapeDtypeStruct`, or of arrays of which only the shapes count.
    """

    name: str
    devices: Sequence[jax.Device]

    @property
    def mesh(self) -> Mesh:
        """Four devices along one axis, `tp`."""
        return Mesh(np.array(self.devices[:4]), ("tp",))

    def compile(self, fn: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
        """Compile `fn(*args)` for one device."""
        device = self.devices[0]
        placed = [_placed(arg, SingleDeviceSharding(device)) for arg in args]
        with jax.default_device(device):
            return jax.jit(fn, donate_argnums=donate).lower(*placed).compile()

    def compile_sharded(
        self,
        fn: Callable[..., Any],
        *args: Any,
        in_specs: tuple[PartitionSpec, ...],
        out_specs: Any,
        donate: tuple[int, ...] = (),
    ) -> Any:
        """Compile `fn(*args)` under `jax.shard_map` over `mesh`. Each spec is for one argument's whole pytree."""
        mesh = self.mesh
        sharded = jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        placed = [_placed(arg, NamedSharding(mesh, spec)) for arg, spec in zip(args, in_specs, strict=True)]
        with jax.set_mesh(mesh):
            return jax.jit(sharded, donate_argnums=donate).lower(*placed).compile()


def _placed(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


@pytest.fixture(scope="session", params=TOPOLOGIES)
def target(request: pytest.FixtureRequest) -> Target:
    """Each TPU generation in turn."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; `pip install libtpu` brings the TPU compiler (no TPU needed)")
    topology = topologies.get_topology_desc(platform="tpu", **TOPOLOGIES[request.param])
    return Target(request.param, topology.devices)


@pytest.fixture(scope="session")
def assert_in_place() -> Callable[[Any, int], None]:
    """Fails unless the compiled call writes its donated pages in place. `kv_bytes` are their bytes per device."""

    def check(compiled: Any, kv_bytes: int) -> None:
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes == kv_bytes, "the pages are not all updated in place"
        assert memory.temp_size_in_bytes < kv_bytes, "the temporaries could hold a copy of the pages"

    return check
