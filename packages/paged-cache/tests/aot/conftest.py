"""Four TPU v6e chips that are not here: libtpu compiles for a topology without a TPU attached."""

import importlib.util
import os

# Read when libtpu is loaded.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    """The chips along one axis, `tp`."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; `pip install libtpu` brings the TPU compiler (no TPU needed)")
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices
    return Mesh(np.array(chips), ("tp",))
