"""How far loading or saving is, and how much memory of the host it took."""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator

from paged_attn_layer._src.convert.extras import needs_extra

_STATUS = pathlib.Path("/proc/self/status")


@contextlib.contextmanager
def byte_progress(doing: str, total: int, *, show: bool) -> Iterator[Callable[[int], object]]:
    """A function to call with the bytes that were done since its last call. It moves a bar with the rate, if `show`."""
    if not show:
        yield lambda _bytes: None
        return
    with needs_extra("generate"):
        from tqdm import tqdm  # noqa: PLC0415
    with tqdm(total=total, desc=doing, unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        yield bar.update


class HostMemory:
    """Measures how far this process's memory rises. Linux says it exactly; elsewhere there is no figure.

    Files that are mapped into memory count too.
    """

    def __init__(self) -> None:
        self._start = 0
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                pathlib.Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
            self._start = _status_bytes("VmRSS")

    def rise(self) -> int | None:
        """Bytes by which the memory was at most above what it was at the start; `None` if the system does not say."""
        return max(0, _status_bytes("VmHWM") - self._start) if sys.platform == "linux" else None


def _status_bytes(key: str) -> int:
    """A line of this process's status, such as `VmRSS:  1234 kB`."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"{_STATUS} has no {key}")
