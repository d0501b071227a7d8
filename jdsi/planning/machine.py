"""What the machines that one can plan for are capable of: data sheets, and how much of them programs get.

Peaks are those of NVIDIA's data sheets for the SXM form, without sparsity. What is reached of them was measured on an
H200, ~4.3 TB/s of device copy and ~790 TFLOP/s of bfloat16 products on random values; the same fractions are assumed of
the other GPUs. Link figures come from the model by which NCCL chooses its algorithms (`src/tuning/cost_model.cc`:
`baseLatencies`, `hwLatencies`; 360 of NVLink's 450 GB/s on Hopper).
"""

import dataclasses
import os
from collections.abc import Mapping
from types import MappingProxyType

import jax.numpy as jnp
from jax.typing import DTypeLike

from jdsi.errors import ConfigError
from jdsi.pallas_kernels.device import H200, Device
from jdsi.sharding.topology import Topology


@dataclasses.dataclass(frozen=True)
class Link:
    """What connects the devices of one host, or the hosts.

    Attributes:
        bandwidth: bytes a second from one device, in one direction, as the data sheet has it.
        fraction: of it that large messages get.
        latency: seconds of one hop with NCCL's protocol for small messages (LL).
        bulk_latency: seconds of one hop with its protocol for large ones (Simple).
    """

    bandwidth: float
    fraction: float
    latency: float
    bulk_latency: float

    @property
    def rate(self) -> float:
        """Bytes a second that large messages get."""
        return self.bandwidth * self.fraction


@dataclasses.dataclass(frozen=True)
class Machine:
    """One device and its links, in bytes, seconds, and operations a second.

    Attributes:
        device: what kernels are chosen for, see `jdsi.pallas_kernels.device.target`.
        memory: of one device.
        reserve: of that memory, what the driver, the communication library and the compiled programs take.
        memory_bandwidth: peak.
        bandwidth_fraction: of it that a kernel gets.
        matmul: peak rate of matrix products by the dtype of their inputs. float32 is without TF32, as the engine runs.
        matmul_fraction: of it that a large product gets.
        inside, between: the links of the devices of one host, and those between hosts, one for each device.
        launch: from the end of one kernel to the start of the next inside a CUDA graph: an assumption.
    """

    device: Device
    memory: int
    reserve: int
    memory_bandwidth: float
    bandwidth_fraction: float
    matmul: Mapping[str, float]
    matmul_fraction: float
    inside: Link
    between: Link
    launch: float

    @property
    def bandwidth(self) -> float:
        """Bytes a second between memory and cores that a kernel gets."""
        return self.memory_bandwidth * self.bandwidth_fraction

    @property
    def usable(self) -> int:
        """Bytes for weights, KV cache and activations. JAX takes all of it only with XLA_PYTHON_CLIENT_MEM_FRACTION."""
        return self.memory - self.reserve

    def matmul_rate(self, dtype: DTypeLike) -> float:
        """Operations a second that products of `dtype` get.

        Raises:
            ConfigError: products of that dtype are not known here.
        """
        name = jnp.dtype(dtype).name
        if name not in self.matmul:
            raise ConfigError(f"no rate for products of {name}; known: {', '.join(self.matmul)}")
        return self.matmul[name] * self.matmul_fraction


_GIB, _MIB = 1 << 30, 1 << 20
_RESERVE = 3 * _GIB  # CUDA context and modules ~1 GiB, NCCL's buffers of a few communicators ~1 GiB: an assumption
_NETWORK = Link(50e9, 0.9, 5.0e-6, 14.0e-6)  # one 400 Gb/s NDR port for each GPU

_HOPPER = {
    "reserve": _RESERVE,
    "bandwidth_fraction": 0.9,
    "matmul": MappingProxyType({"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "int8": 1979e12}),
    "matmul_fraction": 0.8,
    "inside": Link(450e9, 0.8, 0.6e-6, 3.4e-6),
    "between": _NETWORK,
    "launch": 1.5e-6,
}
_GPUS: Mapping[str, Machine] = MappingProxyType(
    {
        "h200": Machine(H200, memory=143771 * _MIB, memory_bandwidth=4.8e12, **_HOPPER),
        "h100": Machine(
            Device("NVIDIA H100 80GB HBM3", "cuda", (9, 0), cores=132, shared_memory=227 * 1024),
            memory=81559 * _MIB,
            memory_bandwidth=3.35e12,
            **_HOPPER,
        ),
        "a100": Machine(
            Device("NVIDIA A100-SXM4-80GB", "cuda", (8, 0), cores=108, shared_memory=163 * 1024),
            memory=81920 * _MIB,
            reserve=_RESERVE,
            memory_bandwidth=2.039e12,
            bandwidth_fraction=0.9,
            matmul=MappingProxyType({"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12, "int8": 624e12}),
            matmul_fraction=0.8,
            inside=Link(300e9, 0.8, 0.6e-6, 3.4e-6),
            between=Link(25e9, 0.9, 5.0e-6, 14.0e-6),  # 200 Gb/s HDR
            launch=1.5e-6,
        ),
    }
)


def machine_for(topology: Topology) -> Machine:
    """The machine that a topology names. Virtual CPU devices share one, so each has its part of everything."""
    if topology.name != "cpu":
        return _GPUS[topology.name]
    share = 1 / topology.count
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Two cores with AVX-512, as README measured them; XLA widens narrow types to float32.
    rates: dict[str, float] = dict.fromkeys(["float32", "bfloat16", "float16"], 300e9 * share)
    link = Link(10e9 * share, 1.0, 20e-6, 20e-6)
    return Machine(
        Device("cpu", "cpu"),
        memory=int(memory * share),
        reserve=int(_GIB * share),
        memory_bandwidth=30e9 * share,
        bandwidth_fraction=1.0,
        matmul=MappingProxyType(rates),
        matmul_fraction=1.0,
        inside=link,
        between=link,
        launch=2e-6,
    )
