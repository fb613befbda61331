"""How the TPU kernels are interpreted where there is no TPU."""

from jax.experimental.pallas import tpu as pltpu

INTERPRET = pltpu.InterpretParams(dma_execution_mode="on_wait", out_of_bounds_reads="raise", uninitialized_memory="nan")
"""The interpreter at its strictest: copies as late as the hardware allows, and nothing read by luck."""

Interpret = bool | pltpu.InterpretParams
"""`False` to compile, or the interpreter's parameters."""
