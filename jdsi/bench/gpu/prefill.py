"""Reading prompts through the engine, kernels on and off, at shapes of well-known models: beside a large product."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

import jdsi
from jdsi.models import Transformer

from ..device_limits import DeviceLimits
from ..limits import product_weights, weight_bytes
from ..prefill import attention_flops
from ..report import spread
from ..rounds import Ratio, seconds
from . import torch_peers
from .backend import start
from .contenders import prepared, ratios, take_turns
from .model_shapes import model_spec, random_model
from .stage_worker import Task

_ROUNDS, _TINY_ROUNDS = 5, 2
_TINY_CASES = ((1, 16), (2, 8))
_MEASURING = 6.0  # seconds that a case takes at most, compiled or not


def measure(task: Task, model: str, cases: Sequence[tuple[int, int]], peers: Sequence[str] = ()) -> None:
    """Seconds from prompts to their first new tokens, the filling of the KV memory included.

    Args:
        task: the stage's.
        model: one of `MODELS`.
        cases: prompts at once and tokens of each, in order of value.
        peers: "transformers", which is not compiled.
    """
    device = start(task)
    tiny = task.rehearsal
    with torch_peers.open_decoders(task, peers, model) as opened:
        task.doing("random weights")
        loaded = random_model(model_spec(model, tiny=tiny))
        cases = _TINY_CASES if tiny else cases
        most = max(batch for batch, _ in cases)
        engines = {
            "kernels": jdsi.init_inference(loaded, max_batch_size=most),
            "xla": jdsi.init_inference(loaded, max_batch_size=most, kernels=False),
        }
        limits = DeviceLimits(2**20, 128, "float32") if tiny else DeviceLimits.of(device.platform)
        product = limits.contenders()["matmul"]
        named = task.cases(cases, lambda case: f"{model}, batch {case[0]}, {case[1]} tokens", need=_MEASURING)
        for i, (batch, length) in enumerate(named):
            what = f"{model} batch {batch}, {length} tokens"
            prompts = np.random.default_rng(batch).integers(0, loaded.spec.vocab_size, (batch, length)).tolist()
            first = {name: partial(_first_tokens, engine, prompts) for name, engine in engines.items()}
            ours = {name: partial(seconds, first[name]) for name in prepared(task, what, first)}
            request = {"do": "prefill", "batch": batch, "length": length}
            others = torch_peers.contenders(task, what, opened, request, reserve=_MEASURING * (len(cases) - i))
            figures = take_turns(task, what, {"matmul": product, **ours, **others}, _TINY_ROUNDS if tiny else _ROUNDS)
            rates = limits.rates(figures.pop("matmul", []))
            flops = prompt_flops(loaded, batch, length)
            for name, times in figures.items():
                task.emit(
                    what,
                    name,
                    seconds=spread(times),
                    bytes=weight_bytes(product_weights(loaded)),
                    flops=flops,
                    tokens_per_second=spread([batch * length / t for t in times]),
                    over=ratios(figures, name),
                    **({"share": Ratio.of([flops / rate for rate in rates], times)} if rates else {}),
                )


def prompt_flops(model: Transformer, batch: int, length: int) -> int:
    """Floating-point operations of reading prompts, see `bench_prefill`."""
    *weights, head = product_weights(model)
    products = length * sum(weight.size for weight in weights) + head.size
    return batch * (2 * products + attention_flops(model.spec, length))


def _first_tokens(engine: jdsi.InferenceEngine, prompts: list[list[int]]) -> Any:
    return engine.generate(prompts, jdsi.SamplingParams(max_new_tokens=1, ignore_eos=True))
