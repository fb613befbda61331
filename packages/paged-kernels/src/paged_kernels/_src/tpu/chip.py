"""Facts about the TPU generations, as values that are passed in."""

import dataclasses

from paged_kernels._src.device import device_in_scope

MIB = 1024 * 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What a kernel must know of the TensorCore that it is compiled for.

    Sources: Google Cloud's TPU pages (bandwidth), and the table in `jax._src.pallas.mosaic.tpu_info` (memories).
    """

    name: str
    """Generation, as in Google's documentation: v4, v5e, v5p, v6e, tpu7x."""
    device_kinds: tuple[str, ...]
    """What `jax.Device.device_kind` says of it."""
    vmem_bytes: int
    """Vector memory of one TensorCore, bytes."""
    smem_bytes: int
    """Scalar memory of one TensorCore, bytes."""
    hbm_bandwidth: float
    """Bytes a second from HBM to one TensorCore (half a chip's on v4, v5p and tpu7x, which have two)."""
    reads_e4m3b11: bool = False
    """Whether it unpacks float8_e4m3b11fnuz, but not float8_e4m3fn (as libtpu 0.0.52 compiles for it)."""

    @classmethod
    def from_device_kind(cls, kind: str) -> "Chip":
        """The generation that `jax.Device.device_kind` names.

        Raises:
            NotImplementedError: it is none of the generations that the kernels are compiled and tested for.
        """
        for chip in CHIPS:
            if kind in chip.device_kinds:
                return chip
        known = ", ".join(chip.name for chip in CHIPS)
        raise NotImplementedError(f"device_kind={kind!r} is no TPU generation known here ({known}); use backend='xla'")


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
"""The chip with the least memory; what suits it suits every other."""


def chip_in_scope() -> Chip:
    """The chip that a computation traced here is for: the mesh's in scope, else the default device's.

    On other platforms, where a kernel can only be interpreted, the smallest chip.

    Raises:
        NotImplementedError: it is a TPU of an unknown generation.
    """
    kind = device_in_scope().device_kind
    return Chip.from_device_kind(kind) if kind.startswith("TPU") else SMALLEST
