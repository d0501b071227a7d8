"""PyTorch beside us, on the same GPU: a program that `TorchPeer` runs, for it must not share JAX's process.

It answers a line of standard input with a line of JSON on standard output: after its start, and then for every request.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from jdsi.errors import ConfigError

from ..peers import Transformers
from ..report import processors
from ..rounds import seconds
from .model_shapes import model_config
from .stage_worker import Task, end_with_parent, plain


class Model:
    """A transformers model with random weights on the GPU.

    Args:
        model: one of `MODELS`.
        tiny: its family's tiny model.
        device: "cuda" or "cpu".
        compiled: whether `torch.compile` makes the decoding program.
    """

    def __init__(self, model: str, tiny: bool, device: str, compiled: bool) -> None:
        config = model_config(model, tiny=tiny)
        self._vocabulary, self._compiled = config.vocab_size, compiled
        self._peer = Transformers.random(config, "bfloat16", device)
        self._warm: set[tuple[int, int]] = set()

    def decode(self, batch: int, prompt: int, new: int) -> float:
        """Seconds of a step, from generations of 1 and of 1 + `new` tokens."""
        prompts = self._prompts(batch, prompt)

        def generate(count: int) -> float:
            return seconds(lambda: self._peer.generate(prompts, count, compiled=self._compiled))

        if (batch, prompt) not in self._warm:
            # The longer one first, for its cache serves both; twice, for graphs are captured the second time.
            for count in (1 + new, 1 + new, 1):
                generate(count)
            self._warm.add((batch, prompt))
        return (generate(1 + new) - generate(1)) / new

    def prefill(self, batch: int, length: int) -> float:
        """Seconds from prompts to their next tokens."""
        prompts = self._prompts(batch, length)
        return seconds(lambda: self._peer.next_tokens(prompts))

    def _prompts(self, batch: int, length: int) -> list[list[int]]:
        return [[(31 * row + 7 * i) % self._vocabulary for i in range(length)] for row in range(batch)]


class Stream:
    """The layers of a model in pinned host memory, copied to the GPU one ahead of the one that computes.

    Two buffers on the device, a stream of its own for the copies, plain matrix products in between: how anyone would
    write it first.

    Args:
        layers: how many.
        shapes: `[out, in]` of the matrices of each.
        device: "cuda" or "cpu".
    """

    def __init__(self, layers: int, shapes: list[tuple[int, int]], device: str) -> None:
        import torch

        self._torch, self._gpu = torch, device == "cuda"
        self._host = [[self._random(shape) for shape in shapes] for _ in range(layers)]
        self._buffers = [
            [torch.empty(*shape, dtype=torch.bfloat16, device=device) for shape in shapes] for _ in range(2)
        ]
        self._x = {n: torch.ones(1, n, dtype=torch.bfloat16, device=device) for _, n in shapes}
        self._copies: Any = torch.cuda.Stream() if self._gpu else None

    def _random(self, shape: tuple[int, int]) -> Any:
        matrix = self._torch.randn(*shape, dtype=self._torch.bfloat16)
        return matrix.pin_memory() if self._gpu else matrix

    def run(self, rows: int) -> float:
        """Seconds of a pass over all layers for `rows` tokens."""
        return seconds(lambda: self._pass(rows))

    def _pass(self, rows: int) -> None:
        torch = self._torch
        inputs = {n: x.expand(rows, n).contiguous() for n, x in self._x.items()}
        used: list[Any] = [None, None]
        here = [self._copy(0, used[0])]
        for layer in range(len(self._host)):
            if layer + 1 < len(self._host):
                here.append(self._copy(layer + 1, used[(layer + 1) % 2]))
            if self._gpu:
                torch.cuda.current_stream().wait_event(here[layer])
            for matrix in self._buffers[layer % 2]:
                torch.matmul(inputs[matrix.shape[1]], matrix.T)
            if self._gpu:
                used[layer % 2] = torch.cuda.current_stream().record_event()
        if self._gpu:
            torch.cuda.synchronize()

    def _copy(self, layer: int, after: Any) -> Any:
        """Starts the copies of a layer, once its buffer was used; gives the event of their end."""
        with self._torch.cuda.stream(self._copies) if self._gpu else contextlib.nullcontext():
            if after is not None:
                self._copies.wait_event(after)
            for source, target in zip(self._host[layer], self._buffers[layer % 2], strict=True):
                target.copy_(source, non_blocking=True)
            return self._copies.record_event() if self._gpu else None


_KINDS: Mapping[str, Callable[..., Any]] = MappingProxyType({"model": Model, "stream": Stream})


def compile_ahead(task: Task, model: str) -> None:
    """A stage that has PyTorch compile a peer while nothing is timed; the peer that is timed finds it in a cache.

    Args:
        task: the stage's.
        model: one of `MODELS`.
    """
    from .torch_peers import decoding_peer, why_no_torch

    if why := why_no_torch():
        task.emit("torch.compile", skipped=why)
        return
    task.doing("torch.compile")
    began = time.perf_counter()
    with contextlib.closing(decoding_peer("torch.compile", model, task, tiny=task.rehearsal)) as peer:
        if why := peer.ready(task.left):
            task.emit("torch.compile", failed=why)
        else:
            took = round(time.perf_counter() - began, 1)
            task.emit("torch.compile", facts={"seconds to load, compile and warm up": took})


def main() -> None:
    """Runs the peer that the argument describes until its input ends."""
    # What the libraries print must not get between the lines of the protocol.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: Mapping[str, Any]) -> None:
        answers.write(json.dumps(plain(answer)) + "\n")
        answers.flush()

    settings = json.loads(sys.argv[1])
    end_with_parent(settings.pop("parent"))
    try:
        import torch

        torch.set_num_threads(processors())
        if settings["device"] == "cuda" and not torch.cuda.is_available():
            raise ConfigError("PyTorch sees no GPU")
        warm = settings.pop("warm")
        peer = _KINDS[settings.pop("kind")](**settings)
        for request in warm:
            _answer(peer, request)
        say({"ready": True, "torch": torch.__version__})
        for line in sys.stdin:
            say({"seconds": _answer(peer, json.loads(line))})
    except Exception as error:  # whatever it is, whoever waits must hear of it
        traceback.print_exc()
        say({"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"})
    answers.flush()
    os._exit(0)


def _answer(peer: Any, request: dict[str, Any]) -> float:
    return getattr(peer, request.pop("do"))(**request)


if __name__ == "__main__":
    main()
