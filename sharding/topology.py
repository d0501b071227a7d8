"""Devices one does not have: what a program for them is compiled against."""

import functools
from collections.abc import Sequence
from typing import Any

import jax

from jdsi.errors import ConfigError

# What XLA and the kernel compilers read of the chip. From the CUDA occupancy tables for compute capability 9.0 and the
# H200 data sheet.
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
_TARGETS = {"h200": _H200}


@functools.cache
def topology_devices(name: str, hosts: int = 1, devices_per_host: int = 1) -> Sequence[Any]:
    """Devices of machines that are not here, for `jax.jit(...).lower(...).compile()` and nothing else.

    Needs the CUDA plugin of JAX (extra `aot`), no GPU and no CUDA libraries; set `JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1`
    and, where CUDA libraries but no GPU are installed, `JAX_PLATFORMS=cpu` before JAX is imported.

    Args:
        name: "h200".
        hosts, devices_per_host: how many there are of each.

    Raises:
        ConfigError: an unknown name, or no CUDA plugin.
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
    # Without the plugin JAX raises one or another of these.
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"no compiler for {name}: pip install 'jdsi[aot]' ({error})") from error
    return tuple(description.devices)
