"""A Hugging Face cache that rounds keys and values as quantised pages do, computed in torch."""

import torch
import transformers

LARGEST = {"int8": 127, "int4": 7, "float8_e4m3fn": 448, "float8_e5m2": 57344}
"""The largest magnitude of each type."""


class QuantisedCache(transformers.DynamicCache):
    """Each token's key, and each value, of one head is rounded to multiples of its own scale, `max |x| / largest`."""

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self._dtype = dtype

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *options):
        """Store keys and values after rounding. Returns all of the layer, which its attention then reads."""
        return super().update(self.rounded(keys), self.rounded(values), layer, *options)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x [..., head_dim]` as it is read back."""
        scale = x.abs().amax(-1, keepdim=True) / LARGEST[self._dtype]
        stored = (x / scale).round() if self._dtype.startswith("int") else (x / scale).to(getattr(torch, self._dtype))
        return stored.to(x.dtype) * scale
