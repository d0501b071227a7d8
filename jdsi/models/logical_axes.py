"""What the dimensions of every parameter mean, for `jdsi.sharding`."""

import re
from collections.abc import Mapping

import jax

from jdsi.sharding import AxisRules, LogicalAxes

_AXES: tuple[tuple[str, LogicalAxes], ...] = (
    (r"embedding\.tokens\.weight|head\.weight", ("vocabulary", "width")),
    (r"head\.bias", ("vocabulary",)),
    (r"layers\.\d+\.attention\.qkv\.weight", ("heads", "width")),
    (r"layers\.\d+\.attention\.qkv\.bias", ("heads",)),
    (r"layers\.\d+\.attention\.out\.weight", ("width", "heads")),
    (r"layers\.\d+\.feed_forward\.up\.weight", ("feed_forward", "width")),
    (r"layers\.\d+\.feed_forward\.up\.bias", ("feed_forward",)),
    (r"layers\.\d+\.feed_forward\.down\.weight", ("width", "feed_forward")),
)


def logical_axes(name: str, ndim: int) -> LogicalAxes:
    """What each dimension of parameter `name` means; what is not listed (norms, small tables) is never split."""
    for pattern, axes in _AXES:
        if re.fullmatch(pattern, name):
            return axes
    return (None,) * ndim


def place(abstract: Mapping[str, jax.ShapeDtypeStruct], rules: AxisRules) -> dict[str, jax.ShapeDtypeStruct]:
    """`abstract_parameters` with the sharding that `rules` give each one."""
    return {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=rules.sharding(logical_axes(name, len(leaf.shape)), leaf.shape)
        )
        for name, leaf in abstract.items()
    }
