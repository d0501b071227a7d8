"""llama.cpp as a peer: a process of its own that answers one line of JSON with another."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from jdsi.errors import ConfigError

from .processes import PeerProcess
from .report import processors

_WORKER = Path(__file__).with_name("llama_worker.py")
_CACHE_TOKENS = 8192
_ROWS = 64


class LlamaCpp:
    """A Llama checkpoint in float32 under llama.cpp, in the interpreter that has it.

    The process ends with `close`, or when this one does: it stops at the end of its input.

    Args:
        folder: the checkpoint, in Hugging Face format.
        python: the interpreter; by default the running one.

    Raises:
        ConfigError: the interpreter lacks llama.cpp, or the checkpoint is no plain Llama.
    """

    def __init__(self, folder: Path, python: str | None = None) -> None:
        self._scratch = TemporaryDirectory(prefix="jdsi-bench-")
        settings = {
            "checkpoint": str(folder),
            "gguf": str(Path(self._scratch.name) / "model.gguf"),
            "threads": processors(),
            "context": _CACHE_TOKENS,
            "rows": _ROWS,
        }
        command = [python or sys.executable, str(_WORKER), json.dumps(settings)]
        try:
            self._process = PeerProcess("llama.cpp", command)
        except BaseException as error:
            self._scratch.cleanup()
            if isinstance(error, OSError):
                raise ConfigError(f"--llama-cpp-python {python}: {error}") from error
            raise

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """See `Peer`.

        Raises:
            ConfigError: more rows or tokens than the process was started for.
        """
        needed = sum(map(len, prompts)) + len(prompts) * new_tokens
        if len(prompts) > _ROWS or needed > _CACHE_TOKENS:
            raise ConfigError(
                f"peer 'llama.cpp' is run with at most {_ROWS} rows and {_CACHE_TOKENS} tokens in the cache, "
                f"not {len(prompts)} rows and {needed} tokens"
            )
        return self._process.ask(prompts=[list(p) for p in prompts], new_tokens=new_tokens)["tokens"]

    def close(self) -> None:
        """See `Peer`."""
        self._process.close()
        self._scratch.cleanup()
