"""What the report was measured on: the driver, the GPU and its neighbours, versions, and whether JAX reaches it all."""

import os
import re
import subprocess
from pathlib import Path

from jdsi.errors import ConfigError

from .backend import start
from .stage_worker import Task

LEAST_DRIVER = 580
"""First driver for CUDA 13, which the kernels are compiled with."""

_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "temperature.gpu",
    "pcie.link.gen.max",
    "pcie.link.width.max",
    "mig.mode.current",
)
_PATIENCE = 10.0


def look(task: Task) -> None:
    """Names the machine, and fails where JAX cannot compute on a GPU: then nothing else could be measured.

    Raises:
        ConfigError: there is no NVIDIA GPU, or JAX does not find it.
    """
    if not task.rehearsal:
        task.doing("nvidia-smi")
        facts = gpu_facts()
        task.emit("GPU", facts=facts)
        if why := driver_fault(facts.get("driver_version")):
            task.emit("driver", failed=why)
        if others := _processes():
            task.emit("other programs on the GPU", failed=f"{others} take time and memory from what is measured here")
    task.doing("starting JAX")
    device = start(task)
    import jax
    import jax.numpy as jnp

    from ..report import environment

    if not task.rehearsal and device.platform != "cuda":
        raise ConfigError(
            f"JAX finds no NVIDIA GPU here, only {device.kind}; install jdsi[cuda], or say --rehearse to try the report"
        )
    task.doing("a first product")
    ones = jnp.ones((256, 256), jnp.bfloat16)
    if (found := float(jax.jit(jnp.matmul)(ones, ones)[0, 0])) != 256:
        raise ConfigError(f"a product of ones gives {found} here, which should be 256")
    about = environment()
    facts = {
        "device": device.kind,
        "compute capability": ".".join(map(str, device.capability)),
        "multiprocessors": device.cores,
        "memory that JAX may take": (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"),
        **{key: about[key] for key in ("python", "platform", "cpu", "cores", "memory_bytes")},
        **about["packages"],
    }
    task.emit("program", facts=facts)
    if not task.rehearsal and device.capability != (9, 0):
        task.emit("capability", failed=f"the kernels are for Hopper GPUs (9.0); on {device.kind} XLA does their work")


def gpu_facts() -> dict[str, str]:
    """What `nvidia-smi` says of the GPU, or else the driver; empty where there is neither."""
    said = _smi(f"--query-gpu={','.join(_FIELDS)}")
    if said is not None:
        return dict(zip(_FIELDS, (part.strip() for part in said.splitlines()[0].split(",")), strict=False))
    try:
        version = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return {}
    return {"driver_version": version[1]} if version else {}


def driver_fault(version: str | None) -> str | None:
    """What is wrong with a driver, or `None`."""
    if not version or not version.partition(".")[0].isdigit():
        return "no NVIDIA driver answers: neither nvidia-smi nor /proc/driver/nvidia/version"
    if int(version.partition(".")[0]) < LEAST_DRIVER:
        return f"driver {version} is older than {LEAST_DRIVER}, the first that runs programs compiled with CUDA 13"
    return None


def _processes() -> str:
    return ", ".join((_smi("--query-compute-apps=pid,used_memory") or "").split("\n")).strip(", ")


def _smi(query: str) -> str | None:
    """An answer of `nvidia-smi` about the GPU in use, which is only asked; `None` where it has none."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-i", os.environ.get("CUDA_VISIBLE_DEVICES", "0")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
