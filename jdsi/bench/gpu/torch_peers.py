"""PyTorch's programs as contenders: processes of their own, which load and compile while we do the same."""

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from jdsi.errors import ConfigError, nearest

from ..processes import PeerProcess
from .stage_worker import Task

PROMPT, NEW = 128, 32
"""Tokens of the prompts, and steps that are timed, of decoding stages."""

TINY_PROMPT, TINY_NEW = 8, 4

DECODERS: Mapping[str, bool] = MappingProxyType({"transformers": False, "torch.compile": True})
"""Peers that decode, and whether `torch.compile` makes their programs, for every batch anew."""


class TorchPeer:
    """A process of `torch_peer`.

    Args:
        name: for messages.
        settings: of what it runs; `warm` are requests that it answers before it says that it is ready.
        task: of the stage.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], task: Task) -> None:
        device = "cpu" if task.rehearsal else "cuda"
        argument = json.dumps({"device": device, "parent": os.getpid(), "warm": [], **settings})
        command = [sys.executable, "-P", "-m", f"{__package__}.torch_peer", argument]
        self._process = PeerProcess(name, command, waits=False)
        self._failed: str | None = None

    def ready(self, within: float) -> str | None:
        """Waits until it is; why it is not after so many seconds, or `None`."""
        if self._failed is None and not self._process.ready:
            try:
                if self._process.answer(within) is None:
                    return f"it was not ready within {max(0.0, within):.0f} s"
            except ConfigError as error:
                self._failed = str(error)
        return self._failed

    def seconds(self, **request: Any) -> float:
        """Its answer.

        Raises:
            ConfigError: it failed.
        """
        return self._process.ask(**request)["seconds"]

    def close(self) -> None:
        """Ends it."""
        self._process.close(patience=1)


def why_no_torch() -> str | None:
    """Why there are no peers, or `None`."""
    return None if importlib.util.find_spec("torch") else "PyTorch is not installed"


def decoding_peer(name: str, model: str, task: Task, *, tiny: bool) -> TorchPeer:
    """A peer of `DECODERS`, ready when it has decoded at batch 1.

    Raises:
        ConfigError: there is no such peer.
    """
    if name not in DECODERS:
        raise ConfigError(f"peer {name!r} is not known{nearest(name, DECODERS)}; known are {', '.join(DECODERS)}")
    warm = [decode_request(1, tiny=tiny)]
    return TorchPeer(
        name, {"kind": "model", "model": model, "tiny": tiny, "compiled": DECODERS[name], "warm": warm}, task
    )


def decode_request(batch: int, *, tiny: bool) -> dict[str, Any]:
    """What a peer is asked for the time of a decoding step."""
    prompt, new = (TINY_PROMPT, TINY_NEW) if tiny else (PROMPT, NEW)
    return {"do": "decode", "batch": batch, "prompt": prompt, "new": new}


@contextlib.contextmanager
def open_decoders(task: Task, names: Sequence[str], model: str) -> Iterator[dict[str, TorchPeer]]:
    """Peers that load and warm up while the block goes on; in a short rehearsal, and without PyTorch, none."""
    if names and (why := "a short rehearsal" if task.short else why_no_torch()):
        task.emit(", ".join(names), skipped=why)
        names = ()
    with contextlib.ExitStack() as stack:
        opened = {}
        for name in names:
            opened[name] = decoding_peer(name, model, task, tiny=task.rehearsal)
            stack.callback(opened[name].close)
        yield opened


def contenders(
    task: Task, what: str, peers: Mapping[str, TorchPeer], request: Mapping[str, Any], *, reserve: float
) -> dict[str, Callable[[], float]]:
    """Those of the peers that are ready, or become so while `reserve` seconds of the stage's time are left.

    The others are named in the report.
    """
    runs: dict[str, Callable[[], float]] = {}
    for name, peer in peers.items():
        if why := peer.ready(task.left - reserve):
            task.emit(what, name, failed=why)
        else:
            runs[name] = partial(peer.seconds, **request)
    return runs
