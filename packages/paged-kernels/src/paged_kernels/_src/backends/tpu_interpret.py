"""The TPU kernels in Pallas's interpreter, on every platform: slow, for tests and debugging.

Copies are as late as the hardware allows, and memory that is not initialised is NaN.
"""

import dataclasses

from paged_kernels._src.backends import tpu
from paged_kernels._src.tpu.interpreter import INTERPRET

BACKEND = dataclasses.replace(tpu.BACKEND, name="tpu_interpret", platforms=None, interpret=INTERPRET)
