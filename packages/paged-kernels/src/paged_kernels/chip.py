"""Facts about the TPU generations, as values that are passed in; nothing here asks a device."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What a kernel must know of the TensorCore that it is compiled for."""

    name: str
    """Generation, as in Google's documentation: v4, v5e, v5p, v6e, tpu7x."""
    device_kinds: tuple[str, ...]
    """What `jax.Device.device_kind` says of it."""
    vmem_bytes: int
    """Vector memory of one TensorCore, bytes."""
    hbm_bandwidth: float
    """Bytes a second from HBM to one chip."""
