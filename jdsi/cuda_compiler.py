"""JAX's compiler for NVIDIA GPUs, where it stands beside the environment: it compiles for a GPU that is not there.

Installed like any package (extra `aot`), JAX looks for a driver whenever it starts, and crashes where it finds CUDA
libraries and none, as PyTorch brings them. So it has a folder of its own, which a process that wants it adds.
"""

import importlib.util
import os
import sys
from pathlib import Path

FOLDER = Path(sys.prefix) / "cuda-compiler"
"""Where `make venv` puts it."""

_PLUGIN = "jax_cuda13_plugin"


def find_cuda_compiler() -> bool:
    """Makes JAX see the CUDA compiler, and stay on the CPU if it is the one in `FOLDER`; whether there is one.

    For the start of a process, before it imports JAX: parts of JAX look for the compiler when they are imported.
    Processes that this one starts inherit the platform, not the compiler.
    """
    if importlib.util.find_spec(_PLUGIN) is not None:
        return True
    if not (FOLDER / _PLUGIN).is_dir():
        return False
    sys.path.append(str(FOLDER))
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if not os.environ.get("JAX_PLATFORMS"):
        os.environ["JAX_PLATFORMS"] = "cpu"
    jax = sys.modules.get("jax")
    if jax is not None and not jax.config.jax_platforms:  # it no longer reads the environment
        jax.config.update("jax_platforms", "cpu")
    return True


def remedy(jax_version: str) -> str:
    """What to do where JAX of this version has no compiler for NVIDIA GPUs."""
    if (FOLDER / _PLUGIN).is_dir() and str(FOLDER) not in sys.path:
        return "call jdsi.cuda_compiler.find_cuda_compiler() before importing JAX"
    packages = f"jax-cuda13-plugin=={jax_version} jax-cuda13-pjrt=={jax_version}"
    return f"install it with {sys.executable} -m pip install --upgrade --no-deps --target {FOLDER} {packages}"
