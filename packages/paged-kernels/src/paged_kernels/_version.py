"""The one place of this package's version number."""

__version__ = "0.3.0"
