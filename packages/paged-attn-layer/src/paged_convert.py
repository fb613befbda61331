"""The entry of the command `paged-convert`: Ctrl-C ends it as it ends `paged-generate`."""

import sys

from paged_generate import run_entry


def main() -> int:
    """Run the command. Returns the exit code: 0, or 2 for an error that was reported, or 130 after Ctrl-C."""
    return run_entry("paged-convert", "paged_attn_layer._src.convert_cli")


if __name__ == "__main__":
    sys.exit(main())
