"""`python -m paged_cache plan`: how much of a model's cache fits into memory, as a table."""

import sys

from paged_cache._src.planning.cli import main

if __name__ == "__main__":
    sys.exit(main())
