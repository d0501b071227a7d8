"""Decoding through the engine, kernels on and off, at shapes of well-known models, beside a copy and PyTorch."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

import jdsi
from jdsi.kv_cache import token_bytes
from jdsi.models import Transformer

from ..device_limits import DeviceLimits
from ..limits import product_weights, weight_bytes
from ..passes import Passes
from ..report import spread
from ..rounds import Ratio, seconds
from . import torch_peers
from .backend import start
from .contenders import prepared, ratios, take_turns
from .model_shapes import model_spec, random_model
from .stage_worker import Task

_ROUNDS, _TINY_ROUNDS = 5, 2
_MEASURING = 10.0  # seconds that a case takes at most, compiled or not


def measure(task: Task, model: str, batches: Sequence[int], peers: Sequence[str] = ()) -> None:
    """Seconds of a decoding step: the difference of generating 1 + N tokens and one, over N, for every contender alike.

    Beside the engines the executor's steps are timed alone, which tells what the engine around them takes.

    Args:
        task: the stage's.
        model: one of `MODELS`.
        batches: prompts at once, in order of value.
        peers: of `torch_peers.DECODERS`.
    """
    device = start(task)
    tiny = task.rehearsal
    with torch_peers.open_decoders(task, peers, model) as opened:
        task.doing("random weights")
        loaded = random_model(model_spec(model, tiny=tiny))
        engines = {
            "kernels": jdsi.init_inference(loaded, max_batch_size=max(batches)),
            "xla": jdsi.init_inference(loaded, max_batch_size=max(batches), kernels=False),
        }
        limits = DeviceLimits(2**20, 128, "float32") if tiny else DeviceLimits.of(device.platform)
        decoding = _Decoding(task, loaded, engines, limits, limits.contenders()["copy"])
        late: dict[str, torch_peers.TorchPeer] = {}
        for i, batch in enumerate(task.cases(batches, lambda batch: f"{model}, batch {batch}", need=_MEASURING)):
            # What compiles for every batch anew is worth it for the first one only.
            wanted = {name: peer for name, peer in opened.items() if i == 0 or not torch_peers.DECODERS[name]}
            reserve = _MEASURING * (len(batches) - i)  # those that are not ready must not take the others' time
            took_part = decoding.measure(f"{model} batch {batch}", batch, wanted, reserve)
            late |= {name: peer for name, peer in wanted.items() if i == 0 and name not in took_part}
        ready = {name: peer for name, peer in late.items() if peer.ready(task.left - _MEASURING) is None}
        if ready and task.left > _MEASURING:
            decoding.measure(f"{model} batch {batches[0]}, again", batches[0], ready, _MEASURING)
    if tiny and not task.short:
        from .step_profile import compile_for_h200

        compile_for_h200(task, model)


@dataclasses.dataclass(frozen=True)
class _Decoding:
    """What takes part in every case: the model, its engines, and a copy with the device's limits."""

    task: Task
    model: Transformer
    engines: Mapping[str, jdsi.InferenceEngine]
    limits: DeviceLimits
    copy: Callable[[], float]

    def measure(
        self, what: str, batch: int, peers: Mapping[str, torch_peers.TorchPeer], reserve: float
    ) -> Collection[str]:
        """Adds a case to the report and gives the names of those that took part."""
        task, tiny = self.task, self.task.rehearsal
        request = torch_peers.decode_request(batch, tiny=tiny)
        ours, agree = _contenders(task, what, self.engines, request)
        others = torch_peers.contenders(task, what, peers, request, reserve=reserve)
        runs = {"copy": self.copy, **ours, **others}
        figures = take_turns(task, what, runs, _TINY_ROUNDS if tiny else _ROUNDS)
        bandwidths = self.limits.bandwidths(figures.pop("copy", []))
        _report(task, what, figures, bandwidths, _work(self.model, request), agree)
        return figures.keys()


def _contenders(
    task: Task, what: str, engines: Mapping[str, jdsi.InferenceEngine], request: Mapping[str, Any]
) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """Seconds of a step, by what takes them; and how many of the tokens with kernels are those without."""
    batch, prompt, new = request["batch"], request["prompt"], request["new"]
    executor = engines["kernels"].executor
    prompts = np.random.default_rng(batch).integers(0, executor.spec.vocab_size, (batch, prompt)).tolist()
    calls = {name: partial(_generate, engine, prompts) for name, engine in engines.items()}

    def passes() -> Passes:
        return Passes.generation(executor, 1, batch, (_ROUNDS + 2) * new)

    made = prepared(
        task,
        what,
        {name: partial(_both, call, new) for name, call in calls.items()} | {"kernels, steps alone": passes},
    )
    runs = {name: partial(_per_step, calls[name], new) for name in calls if name in made}
    if (ready := made.pop("kernels, steps alone", None)) is not None:
        runs["kernels, steps alone"] = partial(_steps, ready, new)
    if len(made) < len(engines):
        return runs, {}
    pairs = [a == b for one, two in zip(*made.values(), strict=True) for a, b in zip(one, two, strict=True)]
    return runs, {"tokens equal to xla's": f"{sum(pairs)} of {len(pairs)}"}  # random weights make many near ties


def _generate(engine: jdsi.InferenceEngine, prompts: list[list[int]], count: int) -> list[list[int]]:
    sampling = jdsi.SamplingParams(max_new_tokens=count, ignore_eos=True)
    return [completion.token_ids for completion in engine.generate(prompts, sampling)]


def _both(call: Callable[[int], list[list[int]]], new: int) -> list[list[int]]:
    """Tokens of the longer of the two generations that are timed; both are compiled then."""
    call(1)
    return call(1 + new)


def _per_step(call: Callable[[int], object], new: int) -> float:
    return (seconds(lambda: call(1 + new)) - seconds(lambda: call(1))) / new


def _steps(passes: Passes, count: int) -> float:
    def run() -> None:
        for _ in range(count):
            passes.issue()
        passes.wait()

    return seconds(run) / count


def _work(model: Transformer, request: Mapping[str, Any]) -> dict[str, int]:
    """What a step must at least do: read every matrix and the keys and values of half the steps, multiply."""
    weights, batch = product_weights(model), request["batch"]
    tokens = request["prompt"] + request["new"] // 2
    memory = tokens * token_bytes(model.spec.kv_shapes, weights[0].dtype.itemsize)
    return {
        "bytes": weight_bytes(weights) + batch * memory,
        "flops": 2 * batch * sum(weight.size for weight in weights),
        "rows": batch,
    }


def _report(
    task: Task,
    what: str,
    figures: Mapping[str, list[float]],
    bandwidths: Sequence[float],
    work: Mapping[str, int],
    agree: Mapping[str, str],
) -> None:
    for name, times in figures.items():
        found: dict[str, Any] = {"facts": agree} if name == "kernels" and agree else {}
        if bandwidths:
            found["share"] = Ratio.of([work["bytes"] / bandwidth for bandwidth in bandwidths], times)
        task.emit(
            what,
            name,
            seconds=spread(times),
            bytes=work["bytes"],
            flops=work["flops"],
            tokens_per_second=spread([work["rows"] / t for t in times]),
            over=ratios(figures, name),
            **found,
        )
