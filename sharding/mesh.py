"""Meshes with our axes, and how many devices each axis has."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jdsi.errors import ConfigError

from .collectives import AXES, DATA, EXPERT, PIPE, TENSOR


@dataclasses.dataclass(frozen=True)
class Parallelism:
    """How a model is spread over devices.

    Attributes:
        tensor: devices that share every layer (Megatron's split, arXiv:1909.08053).
        pipeline: stages of consecutive layers.
        data: groups of devices that hold the whole model and share the batch.

    Raises:
        ConfigError: a degree is not an integer of at least 1.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ConfigError(f"{field.name}_parallel={value!r} must be an integer of at least 1")
            object.__setattr__(self, field.name, int(value))

    @property
    def devices(self) -> int:
        """How many devices it takes."""
        return self.tensor * self.pipeline * self.data

    @classmethod
    def of(cls, mesh: Mesh) -> Self:
        """The degrees of a mesh's axes."""
        return cls(*(mesh.shape.get(axis, 1) for axis in (TENSOR, PIPE, DATA)))

    def __str__(self) -> str:
        return f"tensor {self.tensor} x pipeline {self.pipeline} x data {self.data}"


def make_mesh(
    *, tensor: int = 1, pipe: int = 1, data: int = 1, expert: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with the axes "pipe", "data", "expert" and "tensor", neighbouring devices on the last.

    Args:
        tensor, pipe, data, expert: devices on each axis.
        devices: at least as many as that takes; of more, the first. By default all that JAX sees; of more, equally
            many of each process of the run, those of a process side by side.

    Raises:
        ConfigError: there are not that many devices, or they cannot be taken equally from all processes.
    """
    sizes = {PIPE: pipe, DATA: data, EXPERT: expert, TENSOR: tensor}
    for axis, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ConfigError(f"{axis}={size!r} must be an integer of at least 1")
    shape = [sizes[axis] for axis in AXES]
    wanted = int(np.prod(shape))
    found = list(jax.devices() if devices is None else devices)
    if len(set(found)) < len(found) or not found:
        raise ConfigError("devices must be some, each named once")
    if len(found) < wanted:
        hint = "; on a CPU, set JAX_NUM_CPU_DEVICES before JAX starts" if found[0].platform == "cpu" else ""
        asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
        raise ConfigError(f"{asked} takes {wanted} devices, and there are {len(found)} ({found[0].device_kind}){hint}")
    if devices is None and jax.process_count() > 1:
        found = _of_each_process(found, wanted)
    return Mesh(np.array(found[:wanted]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _of_each_process(devices: Sequence[Any], wanted: int) -> list[Any]:
    """As many devices of each process, so that none computes without the others and each has its share of memory."""
    processes = jax.process_count()
    by_process: dict[int, list[Any]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    each, rest = divmod(wanted, processes)
    short = min(len(found) for found in by_process.values())
    if rest or len(by_process) < processes or each > short:
        raise ConfigError(
            f"a mesh of {wanted} devices cannot have equally many of each of the {processes} processes:"
            f" take a multiple of {processes}, up to {short * processes}"
        )
    return [device for process in sorted(by_process) for device in by_process[process][:each]]


def stage_meshes(mesh: Mesh) -> list[Mesh]:
    """One mesh, without the axis "pipe", for each stage of a pipeline.

    Raises:
        ConfigError: the mesh lacks one of our axes.
    """
    if missing := [axis for axis in AXES if axis not in mesh.axis_names]:
        raise ConfigError(
            f"the mesh has the axes {', '.join(map(str, mesh.axis_names))} and lacks {', '.join(missing)}; "
            "jdsi.sharding.make_mesh makes one with all that are needed"
        )
    at = mesh.axis_names.index(PIPE)
    names = [axis for axis in mesh.axis_names if axis != PIPE]
    stages = np.moveaxis(mesh.devices, at, 0)
    return [Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names)) for devices in stages]
