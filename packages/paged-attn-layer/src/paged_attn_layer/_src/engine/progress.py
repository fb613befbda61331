"""A progress bar for serving, on standard error."""

import functools
import importlib
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

from paged_attn_layer._src.engine.request import Request
from paged_attn_layer._src.engine.stats import StepRecord


def optional_module(name: str) -> types.ModuleType:
    """Returns a module that the extra `generate` installs.

    Raises:
        ModuleNotFoundError: it is not installed. The message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise ModuleNotFoundError(
            f"this needs {package}, which is not installed; pip install 'paged-attn-layer[generate]'", name=error.name
        ) from None


def progress_bar(doing: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Returns a function like `tqdm`: it passes an iterable through and shows a progress bar."""
    return functools.partial(optional_module("tqdm").tqdm, desc=doing, dynamic_ncols=True)


class ServingBar:
    """Shows the answers' tokens so far, of the most that the requests may get."""

    def __init__(self, requests: Sequence[Request]) -> None:
        total = sum(request.max_new_tokens for request in requests)
        self._bar = optional_module("tqdm").tqdm(total=total, desc="serving", unit="tok", dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.close()

    def update(self, step: StepRecord, finished: list[Request]) -> None:
        """Add one step to the bar."""
        self._bar.total -= sum(request.max_tokens - request.num_tokens for request in finished)
        shown = f"{step.mode}, {step.running} running, {step.waiting} waiting, {step.pages_used} pages"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(step.new_tokens)
