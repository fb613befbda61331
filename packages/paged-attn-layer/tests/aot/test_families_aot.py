"""The step of every family compiles for TPUs: kernels alone attend, and the pages are updated where they lie."""

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from family_cases import CASES
from jax.experimental import topologies
from jax.sharding import Mesh
from tpu_costing.model_step import StepSizes, bytes_on_device, lower_step

from paged_cache import StepShape

pytestmark = pytest.mark.aot

USUAL = ("llama", "gemma4_text", "gpt_oss", "deepseek_v3")
"""Those of every run: full attention, windows with two shapes of heads, sinks with experts, and latent attention."""
SIZES = StepSizes(shape=StepShape(32, 32), max_seqs=4, pages_per_seq=4, num_pages=64, page_size=16)
RUNS = [
    pytest.param(case, chip, id=f"{case.model_type}-{chip}", marks=() if usual else pytest.mark.slow)
    for case in CASES
    for chip in ("v5e", "v6e")
    for usual in [case.model_type in USUAL and (chip == "v6e") == (case.model_type in USUAL[::2])]
]


@pytest.fixture(scope="module")
def chips(mesh):
    """A mesh of two chips of each generation; `mesh` skips the tests where there is no TPU compiler."""

    def first_two(name):
        return Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name=name).devices[:2]), ("tp",))

    return {chip: first_two(f"{chip}:2x2") for chip in ("v5e", "v6e")}


@pytest.mark.parametrize(("case", "chip"), RUNS)
def test_a_mixed_step_on_two_chips(chips, case, chip):
    settings = transformers.AutoConfig.for_model(**case.config()).to_dict()
    step = lower_step(settings, chips[chip], SIZES, jnp.bfloat16)
    assert "@tpu_custom_call" in step.lowered.as_text()
    memory = step.lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes == bytes_on_device(step.cache)
