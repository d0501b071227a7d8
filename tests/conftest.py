"""Settings every test runs under."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from costs import Costs
from jdsi.cuda_compiler import find_cuda_compiler

if TYPE_CHECKING:
    import transformers

    import jdsi

ROOT = Path(__file__).resolve().parent.parent
ON_GPU = os.environ.get("JDSI_TEST_GPU") == "1"

# Before the first import of jax, and in the environment so that the processes which tests start inherit it.
if not ON_GPU:
    # The CUDA libraries that PyTorch brings must not make JAX look for a GPU.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    find_cuda_compiler()
    # Virtual devices, for meshes; what uses no mesh runs on the first.
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Where a shell runs this in the background Ctrl-C is ignored, and what a test interrupts would never end.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# A kernel's warpgroups are threads in the interpreter, and they wait for each other: on a machine with fewer cores than
# warpgroups XLA's thread pool would not run them all, and the test would never end.
os.environ.setdefault("NPROC", "8")
# Most of the time goes into compiling the same small programs; a second run reads them back. JAX's own size limit would
# have every write look at all entries there are, under a lock, which takes longer the more tests have run. Without it a
# worker may read what another has half written: that costs a compilation, as the warning filters have it.
CACHE, CACHE_BYTES = ROOT / ".jax_cache", 2**30
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def pytest_configure(config: pytest.Config) -> None:
    """Once a run, before it: takes the oldest entries out of a compilation cache that has grown too large."""
    config.pluginmanager.register(Costs())
    if hasattr(config, "workerinput") or not CACHE.is_dir():
        return
    room = CACHE_BYTES
    with contextlib.suppress(FileNotFoundError):  # another run is doing the same
        for entry in sorted(CACHE.iterdir(), key=lambda entry: entry.stat().st_mtime_ns, reverse=True):
            room -= entry.stat().st_size
            if room < 0:
                entry.unlink()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips, with the way to run them, the tests this run leaves out; `-m` naming a marker is a request to run them."""
    asked = config.getoption("markexpr")
    left_out = {}
    if not ON_GPU and not find_cuda_compiler():
        left_out["aot"] = "needs the CUDA compiler, which `make venv` brings"
    if not config.getoption("slow") and "slow" not in asked:
        left_out["slow"] = "slow: run with `make test-all`"
    if not ON_GPU:
        left_out["gpu"] = "needs a GPU: run with `make test-gpu`"
    for item in items:
        for marker, reason in left_out.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """XLA optimises little: for modules of many programs, each run a few times and compared within a tolerance."""
    import jax

    from compilation import few_optimizations

    with few_optimizations():
        yield
    jax.clear_caches()  # so that nothing else runs on these programs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer; a module whose tests want another has a fixture of this name."""
    from checkpoints import save_llama

    path = tmp_path_factory.mktemp("llama")
    save_llama(path)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> "jdsi.InferenceEngine":
    """With all defaults."""
    import jdsi

    return jdsi.init_inference(folder)


@pytest.fixture(scope="module")
def torch_model(folder: Path) -> "transformers.PreTrainedModel":
    """What PyTorch makes of it."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
