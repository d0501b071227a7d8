"""Decoding speed: tokens per second of the public engine, beside the memory limit and peers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import jdsi
from jdsi.errors import ConfigError

from .limits import Chain, product_weights, weight_bytes
from .peers import Peer, check_peers, close_peers, open_peers
from .report import Report, ratio_text, spread, warn, warn_if_busy
from .rounds import Ratio, interleave, seconds
from .shapes import checkpoint

Generate = Callable[[list[list[int]], int], list[list[int]]]

_NOTES = (
    "All contenders took turns in the same rounds; a ratio is the median of the rounds' ratios (smallest to largest).",
    "time: a token after the first for every row, from generations of 1 and of 1 + new tokens. GB/s: matrix bytes over"
    " it.",
    "limit: a chain of XLA matrix-vector products with the model's matrices; chain: the same with as many vectors as"
    " rows.",
)


def bench_decode(
    model: str | None = None,
    *,
    shape: str = "llama-125m",
    batches: Sequence[int] = (1, 4, 8),
    prompt: int = 32,
    new_tokens: int = 64,
    rounds: int = 5,
    dtype: str = "float32",
    peers: Sequence[str] = (),
    llama_cpp_python: str | None = None,
) -> Report:
    """Time per decoding step through `engine.generate`, greedy and deaf to end-of-sequence tokens.

    The time of a step is the difference between generating `1 + new_tokens` tokens and generating one, over
    `new_tokens`: prefill and whatever a call costs cancel out, and it holds for every contender alike, whichever way
    it queues its steps. Bytes are those of the matrices that a step must read, whatever the batch; the KV cache, small
    at these lengths, is not counted.

    Args:
        model: folder or hub id; by default random weights of `shape`.
        shape: see `SHAPES`.
        batches: prompts given at once.
        prompt: tokens of each prompt.
        new_tokens: steps that are timed.
        rounds: of measuring.
        dtype: of weights and activations, for us and the peers.
        peers: `"transformers"`, `"llama.cpp"`.
        llama_cpp_python: the interpreter that has llama.cpp; by default the running one.

    Raises:
        ConfigError: a number is not positive, the shape or a peer is unknown, or a peer is not installed.
    """
    if min([*batches, prompt, new_tokens, rounds], default=0) < 1 or not batches:
        raise ConfigError(f"{batches=}, {prompt=}, {new_tokens=} and {rounds=} must be positive")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"{dtype=} must be float32, bfloat16 or float16")
    check_peers(peers)
    warn_if_busy()
    with checkpoint(model, shape, dtype) as folder:
        others = open_peers(peers, folder, dtype, llama_cpp_python)
        try:
            results = _measure(folder, others, batches, prompt, new_tokens, rounds, dtype)
        finally:
            close_peers(others)
    settings = {
        "model": model or shape,
        "batches": list(batches),
        "prompt": prompt,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "dtype": dtype,
        "peers": list(peers),
    }
    return Report("decode", settings, results, _table(results), _NOTES)


def _measure(
    folder: Any, others: dict[str, Peer], batches: Sequence[int], prompt: int, new: int, rounds: int, dtype: str
) -> list[dict[str, Any]]:
    loaded = jdsi.load_model(folder, dtype=dtype)
    # The engine takes the model as it is, so that the limit reads the very arrays that the engine does.
    engine = jdsi.init_inference(loaded, max_batch_size=max(batches))
    weights = product_weights(loaded)

    def ours(prompts: list[list[int]], count: int) -> list[list[int]]:
        sampling = jdsi.SamplingParams(max_new_tokens=count, ignore_eos=True)
        return [completion.token_ids for completion in engine.generate(prompts, sampling)]

    programs: dict[str, Generate] = {"jdsi": ours, **{name: peer.generate for name, peer in others.items()}}
    limit = Chain(weights, 1).compiled()
    results = []
    for batch in batches:
        warn(f"decode: batch {batch}")
        prompts = np.random.default_rng(batch).integers(0, engine.spec.vocab_size, (batch, prompt)).tolist()
        tokens = {name: generate(prompts, 1 + new) for name, generate in programs.items()}
        contenders: dict[str, Callable[[], float]] = {
            name: lambda g=generate, p=prompts: (seconds(lambda: g(p, 1 + new)) - seconds(lambda: g(p, 1))) / new
            for name, generate in programs.items()
        }
        contenders["limit"] = _repeated(limit, new)
        if batch > 1:
            contenders["chain"] = _repeated(Chain(weights, batch).compiled(), new)
        figures = interleave(contenders, rounds)
        results.append(_result(batch, figures, tokens, weight_bytes(weights)))
    return results


def _repeated(run: Callable[[], None], times: int) -> Callable[[], float]:
    return lambda: seconds(lambda: [run() for _ in range(times)]) / times


def _result(
    batch: int, figures: dict[str, list[float]], tokens: dict[str, list[list[int]]], nbytes: int
) -> dict[str, Any]:
    ours = figures["jdsi"]
    contenders = {}
    for name, times in figures.items():
        entry: dict[str, Any] = {
            "seconds_per_step": spread(times),
            "gigabytes_per_second": spread([nbytes / t / 1e9 for t in times]),
        }
        if name in tokens:
            entry["tokens_per_second"] = spread([batch / t for t in times])
        if name in tokens and name != "jdsi":
            pairs = [
                a == b for x, y in zip(tokens["jdsi"], tokens[name], strict=True) for a, b in zip(x, y, strict=True)
            ]
            entry["equal_tokens"], entry["compared_tokens"] = sum(pairs), len(pairs)
            if not all(pairs):
                warn(f"warning: {name} gives other tokens: {sum(pairs)} of {len(pairs)} are equal at batch {batch}")
        contenders[name] = entry
    # Speeds, so times the other way round: above one means that jdsi is faster.
    ratios = {name: Ratio.of(times, ours) for name, times in figures.items() if name != "jdsi"}
    return {"batch": batch, "bytes_per_step": nbytes, "contenders": contenders, "jdsi_speed_over": ratios}


def _table(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [["batch", "contender", "time", "tokens/s", "GB/s", "speed of jdsi over it", "tokens equal to jdsi's"]]
    for result in results:
        for name, entry in result["contenders"].items():
            speed = entry.get("tokens_per_second")
            equal = f"{entry['equal_tokens']} of {entry['compared_tokens']}" if "equal_tokens" in entry else ""
            rows.append(
                [
                    str(result["batch"]),
                    name,
                    f"{entry['seconds_per_step']['median'] * 1e3:.2f} ms",
                    f"{speed['median']:.1f}" if speed else "",
                    f"{entry['gigabytes_per_second']['median']:.1f}",
                    ratio_text(result["jdsi_speed_over"].get(name)),
                    equal,
                ]
            )
    return rows
