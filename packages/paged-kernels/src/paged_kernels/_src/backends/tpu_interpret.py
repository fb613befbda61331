"""The TPU kernels in Pallas's interpreter, on every platform. Slow; for tests and debugging.

Copies arrive as late as the hardware allows, and uninitialised memory is NaN.
"""

import dataclasses

from paged_kernels._src.backends import tpu
from paged_kernels._src.tpu.interpreter import INTERPRET

BACKEND = dataclasses.replace(tpu.BACKEND, name="tpu_interpret", platforms=None, interpret=INTERPRET)
