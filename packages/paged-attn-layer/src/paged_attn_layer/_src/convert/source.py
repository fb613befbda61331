"""What loading needs of a checkpoint: a config, names with shapes, and one weight at a time."""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from paged_attn_layer._src.convert.lazy import LazyArray

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class WeightSource(Protocol):
    """A checkpoint whose weights have Hugging Face's names and Hugging Face's axes (`[out, in]`)."""

    where: str
    """Its path, or what it is, for messages."""
    settings_from: str
    """What states the settings, for messages: a file or an argument."""

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

    def weight(self, name: str) -> LazyArray:
        """One weight, in the type it is stored in (float32 where it is quantised). Nothing is read yet."""
        ...


class ConversionError(ValueError):
    """A checkpoint does not fit its model. The message lists every problem, a line each."""

    def __init__(self, path: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"{path} cannot be converted; nothing was loaded:\n{lines}")


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """The boundary around a file's content: whatever is wrong with it is an error that names the file.

    Raises:
        ValueError: the content means nothing, or not what it must.
        NotImplementedError: the content is not supported.
    """
    try:
        yield
    except (ConversionError, ImportError):
        raise
    except NotImplementedError as error:
        raise NotImplementedError(_naming(path, error)) from error
    except ValueError as error:
        raise ValueError(_naming(path, error)) from error
    except Exception as error:  # what libraries raise for content that they do not expect is of any kind
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); download it again") from error


def require_file(path: pathlib.Path, advice: str) -> None:
    """Raises an error if `path` is no regular file, for opening a pipe or a device may never return.

    Raises:
        ValueError: nothing is there, which `advice` says how to mend, or it is no regular file.
    """
    if path.is_file():
        return
    if path.exists():
        raise ValueError(f"{path} is not a regular file; download it again")
    raise ValueError(f"{path} is missing; {advice}")


def _naming(path: str | os.PathLike[str], error: Exception) -> str:
    return str(error) if str(path) in str(error) else f"{path}: {error}"
