"""Makes a kernel's loop bounds constants. The compiler's cost model skips loops whose bounds it does not know.

First, the arrays that a `pallas_call` gets in scalar memory are computed on the CPU, from the real lengths. Then the
kernel is compiled with these values as constants: it begins by storing them into scalar memory. Page ids are left out,
because no loop depends on them. Nothing else changes. Any kernel can be used, because only `pallas_call` is replaced.
"""

import functools
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

KERNEL = "costed"
"""Name of the kernels in the dumps, followed by their number."""


class KnownScalars:
    """The integers that each kernel of a call gets, and the number of them that the kernels store."""

    def __init__(self, call: Callable[..., Any], integers: Any, shapes: tuple[Any, ...], device: Any) -> None:
        """Trace `call(integers, *arrays)` for `device`, and compute its integers on the CPU.

        Args:
            call: the function that calls the kernels.
            integers: a pytree of numpy arrays.
            shapes: pytrees of `jax.ShapeDtypeStruct` for the other arguments.
            device: the `jax.Device` to trace for.
        """
        self.values: dict[int, list[np.ndarray | None]] = {}
        self.stores = 0
        self._kernels = 0
        with self._pallas_call(self._recording), jax.default_device(device):
            traced = jax.make_jaxpr(call)(integers, *shapes)
        jax.clear_caches()

        def compute(*leaves):
            zeros = (jnp.zeros(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes))
            jax.extend.core.jaxpr_as_fun(traced)(*leaves, *zeros)

        jax.jit(compute)(*jax.tree.leaves(integers))
        jax.effects_barrier()

    @contextmanager
    def stored(self, page_table: np.ndarray):
        """While this is active, kernels begin by storing the known integers, except the page table."""
        with self._pallas_call(functools.partial(self._storing, page_table)):
            yield

    @contextmanager
    def _pallas_call(self, replacement: Callable[..., Any]):
        original, self._kernels = pl.pallas_call, 0
        pl.pallas_call = functools.partial(replacement, original)
        try:
            yield
        finally:
            pl.pallas_call = original

    def _next_kernel(self) -> int:
        self._kernels += 1
        return self._kernels - 1

    def _recording(self, _original, _kernel, *, out_shape: Any, **_options: Any):
        number = self._next_kernel()

        def keep(*arrays):
            self.values[number] = [np.asarray(array) if array.dtype == jnp.int32 else None for array in arrays]

        def run(*operands):
            leaves = jax.tree.leaves(operands)
            jax.debug.callback(keep, *(leaf if leaf.dtype == jnp.int32 else jnp.int8(0) for leaf in leaves))
            return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), out_shape)

        return run

    def _storing(self, page_table: np.ndarray, original, kernel, **options: Any):
        number = self._next_kernel()
        spec = options.get("grid_spec")
        grid = options.get("grid", ()) if spec is None else spec.grid
        dimensions = len(grid) if isinstance(grid, tuple | list) else 1

        def store(refs: Any) -> None:
            for ref, values in zip(jax.tree.leaves(refs), self.values[number], strict=True):
                if values is not None and "smem" in str(jax.typeof(ref)) and not _holds(values, page_table):
                    self.stores += values.size
                    for index in np.ndindex(values.shape):
                        ref[index] = jnp.int32(values[index])

        def run(*operands):
            def kernel_of_constants(*refs):
                starts = [pl.program_id(axis) == 0 for axis in range(dimensions)]
                inputs = refs[: len(operands)]
                if starts:
                    pl.when(functools.reduce(jnp.logical_and, starts))(lambda: store(inputs))
                else:
                    store(inputs)
                kernel(*refs)

            return original(kernel_of_constants, **{**options, "name": f"{KERNEL}{number}"})(*operands)

        return run


def _holds(values: np.ndarray, page_table: np.ndarray) -> bool:
    """True if `values` is the page table, perhaps with padded rows."""
    seqs, columns = page_table.shape
    if values.size < page_table.size or values.size % seqs:
        return False
    return np.array_equal(values.reshape(seqs, -1)[:, :columns], page_table)
