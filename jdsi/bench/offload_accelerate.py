"""Hugging Face accelerate's own ways of running a model that is larger than memory: a program that `OffloadPeer` runs.

It answers a line of standard input with a line of JSON on standard output: after its start, and then for every turn.
"""

import contextlib
import dataclasses
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from .offload_contenders import Turn, drop_cache, prompts, timed


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

    def turn(self) -> Turn:
        """See `Contender.turn`; one step of what `generate` does."""
        drop_cache(self._files)
        return timed(lambda: self._step(self._next))

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


_PLACES: Mapping[str, Callable[[Path, Path, Any, str], list[Path]]] = MappingProxyType(
    {"disk-offload": _on_disk, "cpu-offload": _in_memory}
)
"""What puts the weights where a peer wants them and returns the files that it reads."""


def open_model(name: str, source: Path, scratch: Path, dtype: str, rows: int, device: str) -> Accelerated:
    """A peer that has read its prompts; for the arguments see `open_offload_peers`."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(source)
    with _accelerate().init_empty_weights(include_buffers=False):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.eval().requires_grad_(False)
    return Accelerated(model, rows, _PLACES[name](source, scratch, model, device), device)


def main() -> None:
    """Runs the peer that the argument describes until its input ends."""
    settings = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(settings.pop("threads"))
    with contextlib.redirect_stdout(sys.stderr):  # whatever the libraries have to say is no answer
        source, scratch = Path(settings.pop("source")), Path(settings.pop("scratch"))
        peer = open_model(source=source, scratch=scratch, **settings)
    _answer(peer, None)
    for _ in sys.stdin:
        _answer(peer, peer.turn())


def _answer(peer: Accelerated, turn: Turn | None) -> None:
    said = {"tokens": peer.tokens[-1].tolist(), "margins": peer.margins[-1].tolist()}
    took = {} if turn is None else dataclasses.asdict(turn)
    sys.stdout.write(json.dumps(said | took) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
