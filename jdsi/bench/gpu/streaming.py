"""Decoding with weights that stay in host memory: how close to the link, beside a bare copy and a loop in PyTorch."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import jdsi
from jdsi.converters.block_store import BlockStore
from jdsi.models.families import family_for
from jdsi.runtime.memory import peak_device_memory
from jdsi.runtime.offload import footprint_on
from jdsi.runtime.residency import plan_residency
from jdsi.runtime.streamed import StreamedExecutor
from jdsi.runtime.weight_sources import HostSource

from ..offload_contenders import Decoding
from ..report import spread
from ..rounds import Ratio
from ..shapes import shape_config
from .backend import start
from .contenders import prepared, ratios, take_turns
from .limits import link_copies
from .model_shapes import random_model
from .stage_worker import Task
from .torch_peers import TorchPeer, why_no_torch

_ROUNDS, _TINY_ROUNDS = 5, 2
_LAYERS = 6  # more than the buffers that they pass through
_BATCHES = (1, 8)  # that share a pass
_VOCABULARY = 4096  # what stays on the device is not what is measured
_LINK = (4, 2**28)  # arrays and bytes of each in the bare copy
_MEASURING = 6.0
_TORCH = "a loop in PyTorch"


def measure(task: Task) -> None:
    """Seconds of a pass over the layers of an 8B model's shape, which come from pinned host memory every time.

    The GPU holds no layer but those on their way; the most that was in use proves it.

    Args:
        task: the stage's.
    """
    start(task)
    tiny = task.rehearsal
    config = _config(task)
    with contextlib.ExitStack() as stack:
        peer = _open_peer(task, config, stack)
        ready = _folder(task).exists()
        store = BlockStore.open(_folder(task) if ready else _write(task))
        residency = plan_residency(footprint_on(store, np.dtype("bfloat16")), None)
        nbytes = sum(store.blocks[name].bytes_stored for name in residency.streamed)
        task.doing("bringing them to pinned memory")
        executor = StreamedExecutor(store, residency, dtype="bfloat16", source=HostSource(store))
        stack.callback(executor.close)
        rounds = _TINY_ROUNDS if tiny else _ROUNDS
        made = prepared(
            task,
            "streaming",
            {_name(count): partial(Decoding, executor, 1, count, rounds + 2) for count in _BATCHES},
            threads=1,  # they share the stream, whose passes come one at a time
        )
        for decoding in made.values():
            decoding.turn()
        facts: dict[str, Any] = {
            "bytes of weights": store.nbytes,
            "bytes of them that every pass streams": nbytes,
            "bytes planned on the device": residency.nbytes,
        }
        if ready:  # else making the weights was what took most
            facts["most bytes in use on the device"] = peak_device_memory()
        task.emit("memory", facts=facts)
        # What is copied beside them takes memory of its own, and is made only now.
        copy, copied = link_copies(*((2, 2**16) if tiny else _LINK))["pinned host memory to the device"]
        runs: dict[str, Callable[[], float]] = {"copy": copy}
        runs |= {name: lambda d=decoding: d.turn().seconds for name, decoding in made.items()}
        if peer is not None:
            if why := peer.ready(task.left - _MEASURING):
                task.emit("streaming", _TORCH, failed=why)
            else:
                runs[_TORCH] = partial(peer.seconds, do="run", rows=1)
        figures = take_turns(task, "streaming", runs, rounds)
        copies = figures.pop("copy", [])
        for name, times in figures.items():
            share = {"share": Ratio.of([s * nbytes / copied for s in copies], times)} if copies else {}
            task.emit(
                "a pass over the layers", name, seconds=spread(times), bytes=nbytes, over=ratios(figures, name), **share
            )


def _name(count: int) -> str:
    return "kernels" if count == 1 else f"kernels, {count} batches"


def _open_peer(task: Task, config: Any, stack: contextlib.ExitStack) -> TorchPeer | None:
    """PyTorch's loop over the same matrices, which is set up while we do the same."""
    if why := "a short rehearsal" if task.short else why_no_torch():
        task.emit("streaming", _TORCH, skipped=why)
        return None
    width, hidden = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * (width // config.num_attention_heads)
    shapes = [(width + 2 * keys, width), (width, width), (2 * hidden, width), (width, hidden)]
    settings = {"kind": "stream", "layers": config.num_hidden_layers, "shapes": shapes}
    peer = TorchPeer(_TORCH, settings | {"warm": [{"do": "run", "rows": 1}]}, task)
    stack.callback(peer.close)
    return peer


def write(task: Task) -> None:
    """A stage that writes what `measure` streams, while nothing is timed.

    Args:
        task: the stage's.
    """
    start(task)
    folder = _write(task)
    task.emit("files", facts={"bytes": sum(file.stat().st_size for file in folder.iterdir())})


def _write(task: Task) -> Path:
    task.doing("writing random weights")
    config, source = _config(task), Path(task.scratch) / "streamed-config"
    config.save_pretrained(source)
    engine = jdsi.init_inference(random_model(family_for(config.model_type).spec(config)))
    return engine.save(_folder(task), to="streaming", like=source)


def _folder(task: Task) -> Path:
    return Path(task.scratch) / "streamed"


def _config(task: Task) -> Any:
    changes = {"vocab_size": _VOCABULARY, "num_hidden_layers": _LAYERS}
    return shape_config("llama-mini" if task.rehearsal else "llama-8b", **changes)
