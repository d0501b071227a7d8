"""How a stage that uses JAX begins."""

import dataclasses
import importlib
from collections.abc import Mapping

from jdsi.cuda_compiler import find_cuda_compiler
from jdsi.pallas_kernels import registry
from jdsi.pallas_kernels.device import Device, current_device

from .stage_worker import Task


def start(task: Task) -> Device:
    """Has operators do without the kernels that were not right, and names the device."""
    if task.rehearsal:
        find_cuda_compiler()
    leave_out(task.left_out)
    return current_device()


def leave_out(kernels: Mapping[str, Mapping[str, str]]) -> None:
    """Takes kernels away from operators for the rest of the process.

    Args:
        kernels: by operator and name of the kernel, the reason.
    """
    for name, entry in registry.operators().items():
        gone, operator = kernels.get(name, {}), entry.operator
        if gone:
            kept = tuple(kernel for kernel in operator.kernels if kernel not in gone)
            # Where the public functions look for it, as the registry does.
            api = importlib.import_module(f"{operator.package}.api")
            setattr(api, name.upper(), dataclasses.replace(operator, kernels=kept))
