"""Refuses arrays whose memory an earlier call took over (`donate_argnums` of `jax.jit`)."""

from typing import Any

import jax
from jax.core import Tracer


def check_not_donated(name: str, argument: Any) -> None:
    """Check that no array of this pytree is deleted. Traced arrays are not checked.

    Raises:
        ValueError: names the array, and says what to use instead.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(argument):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.is_deleted():
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is deleted: it was donated to an earlier call, which reused its "
                "memory; use what that call returned in its place"
            )
