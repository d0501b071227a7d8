"""How much memory there is."""

import resource
import sys
from pathlib import Path

import jax


def available_memory() -> int:
    """Bytes free for weights and KV on JAX's default device; on a CPU what the machine has available."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return int(stats.get("bytes_limit", 0)) - int(stats.get("bytes_in_use", 0))
    return available_host_memory()


def available_host_memory() -> int:
    """Bytes the machine could give this process, within the limits of its control group and address space."""
    found = [_meminfo("MemAvailable")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(file).read_text()) - used_memory())
        except (OSError, ValueError):  # no control group, or "max"
            continue
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        found.append(soft - used_memory(virtual=True))
    return max(0, min(found))


def used_memory(*, virtual: bool = False) -> int:
    """Bytes this process holds now; `virtual` counts address space."""
    try:
        pages = Path("/proc/self/statm").read_text().split()
    except OSError:
        return peak_memory()
    return int(pages[0 if virtual else 1]) * resource.getpagesize()


def peak_memory() -> int:
    """Most bytes this process has held so far."""
    try:  # what getrusage says may be that of the process that started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_memory() -> int | None:
    """Most bytes of JAX's default device in use so far; `None` on a CPU, which has none of its own."""
    device = jax.local_devices()[0]
    return None if device.platform == "cpu" else (device.memory_stats() or {}).get("peak_bytes_in_use")


def _meminfo(key: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 62
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 1 << 62)
