"""The parameters with which Pallas interprets the TPU kernels, on any platform."""

from jax.experimental.pallas import tpu as pltpu

INTERPRET = pltpu.InterpretParams(dma_execution_mode="on_wait", out_of_bounds_reads="raise", uninitialized_memory="nan")
"""The strictest: copies arrive as late as the hardware allows, and uninitialised memory is NaN."""

Interpret = bool | pltpu.InterpretParams
"""`False` to compile, or the parameters of the interpreter."""
