"""Importing the package imports no implementation; a call imports the one that it runs."""

import subprocess
import sys

import pytest
from cpu_targets import TARGETS

LISTED = """
import re, sys, paged_kernels
{call}
pattern = r"jax.*[.]pallas|paged_kernels[.]_src[.](backends[.](reference|cpu|xla|tpu)|cpu|attention[.](reference|xla|tpu)|page_write[.]tpu)"
print([name for name in sys.modules if re.match(pattern, name)])
"""  # noqa: E501
CALL = """
import jax.numpy as jnp
batch = paged_kernels.RaggedBatch.from_lists([[1]], kv_lens=[1], q_lens=[1])
pages = paged_kernels.KVPages.zeros(2, 8, 1, 64, "float32")
paged_kernels.paged_attention(jnp.ones((1, 1, 64)), pages, batch, paged_kernels.AttentionSpec())
"""


def implementations(call=""):
    done = subprocess.run([sys.executable, "-c", LISTED.format(call=call)], capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_the_package_imports_no_implementation():
    assert implementations() == "[]\n"


@pytest.mark.parametrize("unused", ["pallas", "tpu", "reference"])
def test_a_call_imports_the_backend_that_runs_and_no_other(unused):
    found = implementations(CALL)
    assert ("backends.cpu" if TARGETS else "backends.xla") in found
    assert unused not in found
