"""Other programs for models larger than memory, as contenders: processes of their own.

In one process with JAX, whose threads and memory are in their way, they were measured ten times slower than alone.
"""

import contextlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdsi.errors import ConfigError

from .offload_contenders import Turn
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
    """A process of `offload_accelerate`. It ends with `close`, or when this one does: its input ends then.

    Attributes:
        tokens: so far, `[rows]` each.
        margins: how far the logits of each were ahead of the next best, `[rows]` each.

    Raises:
        ConfigError: the process failed.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        self._name = name
        self.tokens: list[np.ndarray] = []
        self.margins: list[np.ndarray] = []
        argument = json.dumps({"name": name, "threads": processors(), **settings}, default=str)
        command = [sys.executable, "-P", "-m", f"{__package__}.offload_accelerate", argument]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def turn(self) -> Turn:
        """See `Contender.turn`."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._read()
        return Turn(answer["seconds"], answer["bytes_read"])

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError(f"peer {self._name!r} ended with status {self._process.wait()}; see its messages above")
        answer = json.loads(line)
        self.tokens.append(np.array(answer["tokens"]))
        self.margins.append(np.array(answer["margins"]))
        return answer


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
