"""Facts about the TPU generations, as values."""

import dataclasses

from paged_kernels._src.device import device_in_scope

MIB = 1024 * 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What a kernel must know about the TensorCore for which it is compiled.

    Sources: Google Cloud's TPU pages (bandwidth), and the table in `jax._src.pallas.mosaic.tpu_info` (memories).
    """

    name: str
    """The generation, as in Google's documentation: v4, v5e, v5p, v6e, tpu7x."""
    device_kinds: tuple[str, ...]
    """The values of `jax.Device.device_kind` for this generation."""
    vmem_bytes: int
    """The vector memory of one TensorCore, in bytes."""
    smem_bytes: int
    """The scalar memory of one TensorCore, in bytes."""
    hbm_bandwidth: float
    """Bytes per second from HBM to one TensorCore. v4, v5p and tpu7x have two: this is half of their chip's."""
    reads_e4m3b11: bool = False
    """True if the chip unpacks float8_e4m3b11fnuz but not float8_e4m3fn (as compiled by libtpu 0.0.52)."""

    @classmethod
    def from_device_kind(cls, kind: str) -> "Chip":
        """Returns the generation of a `jax.Device.device_kind`.

        Raises:
            NotImplementedError: the kernels are not compiled and tested for this generation.
        """
        for chip in CHIPS:
            if kind in chip.device_kinds:
                return chip
        known = ", ".join(chip.name for chip in CHIPS)
        raise NotImplementedError(f"device_kind={kind!r} is not a known TPU generation ({known}); use backend='xla'")


CHIPS = (
    Chip(
        name="v4",
        device_kinds=("TPU v4",),
        vmem_bytes=16 * MIB,
        smem_bytes=MIB,
        hbm_bandwidth=0.615e12,
    ),
    Chip(
        name="v5e",
        device_kinds=("TPU v5 lite", "TPU v5e"),
        vmem_bytes=128 * MIB,
        smem_bytes=MIB,
        hbm_bandwidth=0.82e12,
        reads_e4m3b11=True,
    ),
    Chip(
        name="v5p",
        device_kinds=("TPU v5", "TPU v5p"),
        vmem_bytes=64 * MIB,
        smem_bytes=MIB,
        hbm_bandwidth=1.23e12,
        reads_e4m3b11=True,
    ),
    Chip(
        name="v6e",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        vmem_bytes=128 * MIB,
        smem_bytes=MIB,
        hbm_bandwidth=1.64e12,
        reads_e4m3b11=True,
    ),
    Chip(
        name="tpu7x",
        device_kinds=("TPU7x",),
        vmem_bytes=64 * MIB,
        smem_bytes=MIB,
        hbm_bandwidth=3.7e12,
    ),
)

SMALLEST = CHIPS[0]
"""The chip with the least memory. What fits it fits all others."""


def chip_in_scope() -> Chip:
    """Returns the chip for which a computation is traced: of the mesh in scope, or else of the default device.

    On other platforms a kernel can only be interpreted. There it returns the smallest chip.

    Raises:
        NotImplementedError: it is a TPU of an unknown generation.
    """
    kind = device_in_scope().device_kind
    return Chip.from_device_kind(kind) if kind.startswith("TPU") else SMALLEST
