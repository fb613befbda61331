"""Integers rounded up."""


def cdiv(a: int, b: int) -> int:
    """Returns `a / b`, rounded up."""
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `a`."""
    return cdiv(a, multiple) * multiple
