"""The device that operators choose their kernels for."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Self

import jax


@dataclasses.dataclass(frozen=True)
class Device:
    """What a kernel needs to know of the chip it will run on. Hashable.

    Attributes:
        kind: the name the driver gives it, the key of the tuning table.
        platform: "cpu", "cuda", ...
        capability: CUDA compute capability, (0, 0) elsewhere.
        cores: streaming multiprocessors; a persistent kernel starts this many blocks.
        shared_memory: bytes of shared memory one block can have.
    """

    kind: str
    platform: str
    capability: tuple[int, int] = (0, 0)
    cores: int = 1
    shared_memory: int = 0

    @classmethod
    def of(cls, device: Any) -> Self:
        """The description of one of JAX's devices."""
        if device.platform != "gpu":
            return cls(device.device_kind, device.platform)
        major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
        if not (major.isdigit() and minor.isdigit()):  # AMD says "gfx942"
            return cls(device.device_kind, "rocm")
        capability = (int(major), int(minor))
        return cls(device.device_kind, "cuda", capability, device.core_count, _SHARED_MEMORY.get(capability, 99 * 1024))


# Shared memory a block can opt in to, CUDA C++ Programming Guide, table of technical specifications.
_SHARED_MEMORY = {(8, 0): 163 * 1024, (8, 7): 163 * 1024, (9, 0): 227 * 1024, (10, 0): 227 * 1024}

H200 = Device("NVIDIA H200", "cuda", (9, 0), cores=132, shared_memory=227 * 1024)

_target = jax.make_user_context(None)


@contextlib.contextmanager
def target(device: Device) -> Iterator[None]:
    """Traces and compiles as for `device` instead of the one JAX would run on.

    For compiling for a GPU that is not there, and for running its kernels in Pallas' interpreter. Compiled functions
    remember it: a jitted function called under another target is traced again.
    """
    with _target(device):
        yield


def current_device() -> Device:
    """The device that operators choose for now: the one given to `target`, else JAX's default device."""
    chosen = _target.value
    if chosen is not None:
        return chosen
    default = jax.config.jax_default_device
    if isinstance(default, jax.Device):
        return Device.of(default)
    return Device.of(jax.local_devices(backend=default)[0])


def has_target() -> bool:
    """Whether `target` names the device."""
    return _target.value is not None
