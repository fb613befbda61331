"""What loading needs of a checkpoint on disk: a config, names with shapes, and one weight at a time."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class WeightSource(Protocol):
    """A checkpoint whose weights have Hugging Face's names and Hugging Face's axes (`[out, in]`)."""

    where: str
    """Its path, for messages."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's settings as a Hugging Face `config.json` states them."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...] | None]:
        """Every weight's shape by name; `None` for a weight that cannot be read, which `problems` explains."""
        ...

    @property
    def problems(self) -> Sequence[str]:
        """What is wrong with the files, a line each."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One weight, in the type it is stored in (float32 where it is quantised)."""
        ...


class ConversionError(ValueError):
    """A checkpoint does not fit its model. The message lists every problem, a line each."""

    def __init__(self, path: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"{path} cannot be converted; nothing was loaded:\n{lines}")
