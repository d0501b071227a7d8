"""Devices one does not have: what a program for them is compiled against."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any, Self

import jax

from jdsi.cuda_compiler import remedy
from jdsi.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class _Chip:
    """What XLA and the kernel compilers read of a GPU.

    From the CUDA occupancy tables for its compute capability, and its data sheet: memory in bytes, bandwidth in bytes a
    second, clock in GHz.
    """

    description: str
    capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    shared_memory_per_core: int
    memory: int
    memory_bandwidth: int
    l2_cache: int
    clock: float

    @property
    def proto(self) -> str:
        """XLA's `GpuTargetConfigProto` as text."""
        major, minor = self.capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  core_count: {self.cores} fpus_per_core: {self.fpus_per_core} shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_memory_per_core}
  shared_memory_per_block_optin: {self.shared_memory_per_core - 1024}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {self.memory_bandwidth} l2_cache_size: {self.l2_cache}
  clock_rate_ghz: {self.clock} device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 }}
device_description_str: "{self.description}"
"""


_MIB = 1 << 20
_HOPPER = {"capability": (9, 0), "cores": 132, "fpus_per_core": 128, "shared_memory_per_core": 228 << 10}
_TARGETS = {
    name: chip.proto
    for name, chip in {
        "h200": _Chip(
            "NVIDIA H200",
            memory=150_000_000_000,
            memory_bandwidth=4_800_000_000_000,
            l2_cache=50 * _MIB,
            clock=1.98,
            **_HOPPER,
        ),
        "h100": _Chip(
            "NVIDIA H100 80GB HBM3",
            memory=81559 * _MIB,
            memory_bandwidth=3_350_000_000_000,
            l2_cache=50 * _MIB,
            clock=1.98,
            **_HOPPER,
        ),
        "a100": _Chip(
            "NVIDIA A100-SXM4-80GB",
            (8, 0),
            cores=108,
            fpus_per_core=64,
            shared_memory_per_core=164 << 10,
            memory=81920 * _MIB,
            memory_bandwidth=2_039_000_000_000,
            l2_cache=40 * _MIB,
            clock=1.41,
        ),
    }.items()
}

_GPUS_PER_HOST = 8  # of the HGX and DGX machines that these GPUs come in
_CPU = "cpu"


@functools.cache
def topology_devices(name: str, hosts: int = 1, devices_per_host: int = 1) -> Sequence[Any]:
    """Devices of machines that are not here, for `jax.jit(...).lower(...).compile()` and nothing else.

    Needs JAX's CUDA compiler, no GPU and no CUDA libraries: call `find_cuda_compiler` before JAX is imported.

    Args:
        name: "h200", "h100" or "a100".
        hosts, devices_per_host: how many there are of each.

    Returns:
        The devices, those of a host one behind another.

    Raises:
        ConfigError: an unknown name, or no compiler; says how to get it.
    """
    from jax.experimental import topologies

    if name not in _TARGETS:
        raise ConfigError(f"topology {name!r} is unknown; known: {', '.join(_TARGETS)}")
    try:
        description = topologies.get_topology_desc(
            topology_name=name,
            platform="cuda",
            target_config=_TARGETS[name],
            topology=f"1x{hosts}x{devices_per_host}",
        )
    # Without it JAX raises one or another of these.
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"no compiler for {name}: {remedy(jax.__version__)} ({error})") from error
    return tuple(description.devices)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Machines to plan for, as `h200:8` or `h200:256` names them; `cpu:8` are virtual devices of this machine.

    Attributes:
        name: of the device: "h200", "h100", "a100" or "cpu".
        hosts, devices_per_host: how many there are of each.
    """

    name: str
    hosts: int = 1
    devices_per_host: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """The topology that `text` names: a device, or a device, a colon and how many.

        GPUs come 8 to a host: up to 8 share one, more fill several. CPU devices share this machine.

        Raises:
            ConfigError: an unknown device, or a count that does not fill its hosts.
        """
        match = re.fullmatch(r"\s*([\w-]+)(?::(\d{1,7}))?\s*", text)
        if match is None:
            raise ConfigError(f"topology {text!r} must look like h200:8, a device and how many")
        name, count = match[1].lower(), int(match[2] or 1)
        known = (*_TARGETS, _CPU)
        if name not in known:
            raise ConfigError(f"topology {name!r} is unknown{nearest(name, known)}; known: {', '.join(known)}")
        if count < 1:
            raise ConfigError(f"topology {text!r} must have at least one device")
        if name == _CPU or count <= _GPUS_PER_HOST:
            return cls(name, 1, count)
        if count % _GPUS_PER_HOST:
            above = -(-count // _GPUS_PER_HOST) * _GPUS_PER_HOST
            raise ConfigError(
                f"topology {text!r} does not fill its hosts, which have {_GPUS_PER_HOST} GPUs each:"
                f" take {name}:{above - _GPUS_PER_HOST} or {name}:{above}"
            )
        return cls(name, count // _GPUS_PER_HOST, _GPUS_PER_HOST)

    @classmethod
    def of(cls, devices: Sequence[Any]) -> Self:
        """The topology of devices that are there, equally many of each process, which stands for a host.

        Raises:
            ConfigError: devices that are not known here.
        """
        kind, platform = devices[0].device_kind, devices[0].platform
        name = _CPU if platform == _CPU else next((name for name in _TARGETS if name.upper() in kind.upper()), None)
        if name is None:
            known = ", ".join((*_TARGETS, _CPU))
            raise ConfigError(f"nothing is known of the speed of a {kind}; known: {known}; give the degrees yourself")
        hosts = len({device.process_index for device in devices})
        return cls(name, hosts, len(devices) // hosts)

    @property
    def count(self) -> int:
        """All devices."""
        return self.hosts * self.devices_per_host

    def devices(self) -> Sequence[Any]:
        """Devices to compile for, those of a host one behind another; see `topology_devices`.

        Raises:
            ConfigError: no compiler for the GPU, or JAX was started with fewer CPU devices.
        """
        if self.name != _CPU:
            return topology_devices(self.name, self.hosts, self.devices_per_host)
        found = jax.devices(_CPU)
        if len(found) < self.count:
            raise ConfigError(
                f"topology {self} takes {self.count} CPU devices, and JAX has {len(found)}:"
                f" set JAX_NUM_CPU_DEVICES={self.count} before it starts"
            )
        return tuple(found[: self.count])

    def __str__(self) -> str:
        return f"{self.name}:{self.count}"
