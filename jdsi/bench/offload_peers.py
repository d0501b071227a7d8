"""Hugging Face accelerate's own ways of running a model that is larger than memory, as contenders."""

import contextlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from jdsi.errors import ConfigError

from .offload_contenders import drop_cache, prompts
from .report import processors


class Accelerated:
    """A decoder of transformers whose weights accelerate fetches anew for every pass, module by module.

    The weights stay in the type that they are stored in, as with us, and are widened as they are fetched.

    Args:
        model: with hooks that fetch the weights.
        rows: of the batch that it decodes.
        files: that it reads, whose cache is dropped before every turn.
        device: where it computes.

    Attributes:
        tokens: so far, `[rows]` each.
        margins: how far the logits of each were ahead of the next best, `[rows]` each.
    """

    def __init__(self, model: Any, rows: int, files: Sequence[Path], device: str) -> None:
        import torch
        import transformers

        self._torch, self._model, self._files = torch, model, files
        self.tokens: list[np.ndarray] = []
        self.margins: list[np.ndarray] = []
        # Filled in place. Releases of transformers differ in what the argument is called.
        known = inspect.signature(type(model).forward).parameters
        self._cache = {"cache" if "cache" in known else "past_key_values": transformers.DynamicCache()}
        self._step(torch.tensor(prompts(rows).tolist(), device=device))

    def prepare(self) -> None:
        """See `Contender`."""
        drop_cache(self._files)

    def run(self) -> None:
        """See `Contender`; one step of what `generate` does."""
        self._step(self._next)

    def _step(self, tokens: Any) -> None:
        with self._torch.no_grad():
            out = self._model(tokens, use_cache=True, logits_to_keep=1, **self._cache)
            best, found = out.logits[:, -1].float().topk(2)
        self._next = found[:, :1]
        self.tokens.append(found[:, 0].cpu().numpy())
        self.margins.append((best[:, 0] - best[:, 1]).cpu().numpy())


def _accelerate(module: str = "") -> Any:
    return importlib.import_module(f"accelerate{module}")


def _on_disk(source: Path, scratch: Path, model: Any, device: str) -> list[Path]:
    accelerate, offloading = _accelerate(), _accelerate(".utils.offload")
    where = {name: {"safetensors_file": str(file), "weight_name": name} for name, file in _stored(source)}
    # One tensor at a time. `disk_offload` finds them and writes none itself, which would be as wide as it computes.
    offloading.offload_state_dict(scratch, offloading.OffloadedWeightsLoader(index=where))
    files = [file for file in scratch.iterdir() if file.is_file()]
    accelerate.disk_offload(model, scratch, execution_device=device)
    return files


def _in_memory(source: Path, _: Path, model: Any, device: str) -> list[Path]:
    from safetensors import safe_open

    state = {}
    for name, file in _stored(source):
        with safe_open(file, framework="pt") as opened:
            state[name] = opened.get_tensor(name).clone()  # it is a view of a mapped file
    _accelerate().cpu_offload(model, execution_device=device, state_dict=state)
    return []


def _stored(source: Path) -> Iterator[tuple[str, Path]]:
    from safetensors import safe_open

    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                yield name, file


OFFLOAD_PEERS: Mapping[str, Callable[[Path, Path, Any, str], list[Path]]] = MappingProxyType(
    {"disk-offload": _on_disk, "cpu-offload": _in_memory}
)
"""What puts the weights where a peer wants them and returns the files that it reads."""


def check_installed(names: Sequence[str]) -> None:
    """Raises `ConfigError` where a peer needs what is not installed."""
    for name in names:
        for package, install in (("torch", "'jdsi[torch]'"), ("accelerate", "accelerate")):
            if importlib.util.find_spec(package) is None:
                raise ConfigError(f"peer {name!r} needs {package}, which is not installed: pip install {install}")


@contextlib.contextmanager
def open_offload_peers(
    names: Sequence[str], source: Path, scratch: Path, dtype: str, rows: int
) -> Iterator[dict[str, Accelerated]]:
    """The peers by name, each with its prompts read.

    Args:
        names: see `OFFLOAD_PEERS`.
        source: a Hugging Face folder of safetensors files.
        scratch: a folder to write to.
        dtype: that they compute in.
        rows: of the batch that each decodes.
    """
    if not names:
        yield {}
        return
    import jax
    import torch
    import transformers

    threads = torch.get_num_threads()
    torch.set_num_threads(processors())
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    config = transformers.AutoConfig.from_pretrained(source)
    opened = {}
    for name in dict.fromkeys(names):
        with _accelerate().init_empty_weights(include_buffers=False):
            model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.eval().requires_grad_(False)
        files = OFFLOAD_PEERS[name](source, scratch / name, model, device)
        opened[name] = Accelerated(model, rows, files, device)
    try:
        yield opened
    finally:
        torch.set_num_threads(threads)
