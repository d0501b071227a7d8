"""Other programs for models larger than memory, as contenders: processes of their own.

In one process with JAX, its threads and memory would be in their way.
"""

import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdsi.errors import ConfigError

from .offload_contenders import Turn
from .processes import PeerProcess
from .report import processors

OFFLOAD_PEERS = ("disk-offload", "cpu-offload")
"""Of accelerate: weights in files of its own format, or in memory, fetched module by module for every pass."""


def check_installed(names: Sequence[str]) -> None:
    """Raises `ConfigError` where a peer needs what is not installed."""
    for name in names:
        for package, install in (("torch", "'jdsi[torch]'"), ("accelerate", "accelerate")):
            if importlib.util.find_spec(package) is None:
                raise ConfigError(f"peer {name!r} needs {package}, which is not installed: pip install {install}")


class OffloadPeer:
    """A process of `offload_accelerate`.

    Attributes:
        tokens: so far, `[rows]` each.
        margins: how far the logits of each were ahead of the next best, `[rows]` each.

    Raises:
        ConfigError: the process failed.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        self.tokens: list[np.ndarray] = []
        self.margins: list[np.ndarray] = []
        argument = json.dumps({"name": name, "threads": processors(), **settings}, default=str)
        self._process = PeerProcess(name, [sys.executable, "-P", "-m", f"{__package__}.offload_accelerate", argument])
        self._note(self._process.ready)

    def turn(self) -> Turn:
        """See `Contender.turn`."""
        answer = self._process.ask()
        self._note(answer)
        return Turn(answer["seconds"], answer["bytes_read"])

    def close(self) -> None:
        """Ends the process."""
        self._process.close()

    def _note(self, answer: dict[str, Any]) -> None:
        self.tokens.append(np.array(answer["tokens"]))
        self.margins.append(np.array(answer["margins"]))


@contextlib.contextmanager
def open_offload_peers(
    names: Sequence[str], source: Path, scratch: Path, dtype: str, rows: int
) -> Iterator[dict[str, OffloadPeer]]:
    """The peers by name, each with its prompts read.

    Args:
        names: see `OFFLOAD_PEERS`.
        source: a Hugging Face folder of safetensors files.
        scratch: a folder to write to.
        dtype: that they compute in.
        rows: of the batch that each decodes.

    Raises:
        ConfigError: a process failed.
    """
    import jax

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    with contextlib.ExitStack() as stack:
        opened = {}
        for name in dict.fromkeys(names):
            opened[name] = OffloadPeer(
                name, source=source, scratch=scratch / name, dtype=dtype, rows=rows, device=device
            )
            stack.callback(opened[name].close)
        yield opened
