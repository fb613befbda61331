"""Pages that leave the cache: to host memory, to another cache, to a file.

host pages     `HostPages`, which `apply_moves` fills and reads: sequences that are swapped out
another cache  `export_sequence` and `import_sequence`: computed here, continued there
a file         `save_prefix_cache` and `load_prefix_cache`: prefixes that outlive the process
"""

from paged_cache._src.transfer.host_pages import HostPages
from paged_cache._src.transfer.prefix_file import load_prefix_cache, save_prefix_cache
from paged_cache._src.transfer.sequence_pages import SequencePages, export_sequence, import_sequence

__all__ = [
    "HostPages",
    "SequencePages",
    "export_sequence",
    "import_sequence",
    "load_prefix_cache",
    "save_prefix_cache",
]
