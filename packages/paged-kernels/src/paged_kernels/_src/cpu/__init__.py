"""The compiled CPU kernels, which are in a distribution of their own, `paged-kernels-cpu` (docs/kernels/cpu.md)."""
