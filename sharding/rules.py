"""From what a dimension means to the mesh axis it is split over."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jdsi.errors import ConfigError, nearest

LogicalAxes = tuple[str | None, ...]
"""What each dimension of an array means; `None` for dimensions that are never split."""

TENSOR_PARALLEL: Mapping[str, str] = MappingProxyType(
    {"heads": "tensor", "feed_forward": "tensor", "vocabulary": "tensor"}
)
"""Megatron's split (arXiv:1909.08053): projections to heads and hidden units by rows, those back by columns."""

MESH_AXES: Mapping[str, str] = MappingProxyType({**TENSOR_PARALLEL, "experts": "expert"})
"""The mesh axis over which layers divide a logical axis themselves, inside `jax.shard_map`."""


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Which logical axis is split over which mesh axis; a logical axis without a rule is replicated.

    Raises:
        ConfigError: a rule names a mesh axis that `mesh` lacks, or the mesh's axes are not of type `Auto`.
    """

    mesh: Mesh
    rules: Mapping[str, str] = TENSOR_PARALLEL

    def __post_init__(self) -> None:
        if any(kind != AxisType.Auto for kind in self.mesh.axis_types):
            raise ConfigError(
                "the mesh has explicit axes, under which a model does not run; make it with "
                "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * number of axes)"
            )
        for logical, axis in self.rules.items():
            if axis not in self.mesh.axis_names:
                hint = nearest(axis, self.mesh.axis_names)
                raise ConfigError(
                    f"the rule for {logical!r} names mesh axis {axis!r}{hint}; the mesh has {self.mesh.axis_names}"
                )

    def sharding(self, axes: LogicalAxes, shape: tuple[int, ...]) -> NamedSharding:
        """The sharding of an array of `shape` whose dimensions mean `axes`.

        A dimension that the mesh axis does not divide is replicated: correct everywhere, at the cost of memory.

        Raises:
            ConfigError: two dimensions would be split over the same mesh axis, or `axes` does not fit `shape`.
        """
        if len(axes) != len(shape):
            raise ConfigError(f"{len(axes)} logical axes {axes} for an array of shape {shape}")
        wanted = [self.rules.get(name) if name is not None else None for name in axes]
        used = [axis for axis in wanted if axis is not None]
        if len(used) != len(set(used)):
            raise ConfigError(f"the rules split two dimensions of {axes} over the same mesh axis: {wanted}")
        spec = [
            axis if axis is not None and size % self.mesh.shape[axis] == 0 else None
            for axis, size in zip(wanted, shape, strict=True)
        ]
        return NamedSharding(self.mesh, PartitionSpec(*spec))
