"""Prefill speed: time to the first token of a long prompt, beside the arithmetic limit and peers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import jdsi
from jdsi.errors import ConfigError
from jdsi.models import TransformerSpec
from jdsi.models.spec import AttentionSpec

from .limits import Chain, LargeMatmul, product_weights
from .peers import Transformers, check_peers
from .report import Report, ratio_text, spread, warn, warn_if_busy
from .rounds import Ratio, interleave, seconds
from .shapes import checkpoint

_NOTES = (
    "All contenders took turns in the same rounds; a ratio is the median of the rounds' ratios (smallest to largest).",
    "matmul: one large square float32 product; its rate is the limit. chain: the model's own products with as many rows"
    " as tokens.",
    "GFLOP/s: of products with the matrices (the head's for the last token only) and of causal attention.",
)


def bench_prefill(
    model: str | None = None,
    *,
    shape: str = "llama-125m",
    tokens: int = 512,
    rounds: int = 5,
    dtype: str = "float32",
    peers: Sequence[str] = (),
    matmul_size: int = 2048,
) -> Report:
    """Time from a prompt of `tokens` ids to its first new token, batch 1, through `engine.generate`.

    That is the forward pass of the prompt, filling the KV cache, the logits of the last token and their argmax; the
    peer does the same work. Floating-point operations: 2 per value of every matrix and token (the head: last token
    only), and 2 x 2 per head dimension, query head and pair of a token and one it attends to (sliding windows and
    soft caps are not accounted for).

    Args:
        model: folder or hub id; by default random weights of `shape`.
        shape: see `SHAPES`.
        tokens: of the prompt.
        rounds: of measuring.
        dtype: of weights and activations, for us and the peer; the limit is always float32.
        peers: `"transformers"`.
        matmul_size: rows and columns of the limit's product.

    Raises:
        ConfigError: a number is not positive, the shape or a peer is unknown, or a peer is not installed.
    """
    if min(tokens, rounds, matmul_size) < 1:
        raise ConfigError(f"{tokens=}, {rounds=} and {matmul_size=} must be positive")
    check_peers(peers, ("transformers",))
    warn_if_busy()
    with checkpoint(model, shape, dtype) as folder:
        peer = Transformers.load(folder, dtype) if peers else None
        loaded = jdsi.load_model(folder, dtype=dtype)
    engine = jdsi.init_inference(loaded)
    prompt = np.random.default_rng(0).integers(0, engine.spec.vocab_size, tokens).tolist()
    sampling = jdsi.SamplingParams(max_new_tokens=1, ignore_eos=True)
    programs: dict[str, Callable[[], int]] = {"jdsi": lambda: engine.generate([prompt], sampling)[0].token_ids[0]}
    if peer is not None:
        programs["transformers"] = lambda: peer.next_token(prompt)
    found = {name: program() for name, program in programs.items()}
    weights, large = product_weights(loaded), LargeMatmul(matmul_size)
    runs: dict[str, Callable[[], object]] = {
        **programs,
        "chain": Chain(weights[:-1], tokens).compiled(),
        "matmul": large.compiled(),
    }
    figures = interleave({name: (lambda run=run: seconds(run)) for name, run in runs.items()}, rounds)
    linear = 2 * tokens * sum(w.size for w in weights[:-1])
    total = linear + 2 * weights[-1].size + attention_flops(engine.spec, tokens)
    flops = dict.fromkeys(figures, total) | {"chain": linear, "matmul": large.flops}
    result = _result(figures, flops, tokens, found)
    settings = {
        "model": model or shape,
        "tokens": tokens,
        "rounds": rounds,
        "dtype": dtype,
        "peers": list(peers),
        "matmul_size": matmul_size,
    }
    return Report("prefill", settings, [result], _table(result), _NOTES)


def attention_flops(spec: TransformerSpec, tokens: int) -> int:
    """Floating-point operations of causal attention to a prompt, in all layers."""
    pairs = tokens * (tokens + 1) // 2
    heads = [
        (layer.of(AttentionSpec).num_heads, key, value)
        for layer, (_, key, value) in zip(spec.layers, spec.kv_shapes, strict=True)
    ]
    return sum(2 * pairs * count * (key + value) for count, key, value in heads)


def _result(
    figures: dict[str, list[float]], flops: dict[str, int], tokens: int, found: dict[str, int]
) -> dict[str, Any]:
    rates = {name: [flops[name] / t for t in times] for name, times in figures.items()}
    contenders = {}
    for name, times in figures.items():
        entry: dict[str, Any] = {
            "seconds": spread(times),
            "flops": flops[name],
            "gigaflops_per_second": spread([rate / 1e9 for rate in rates[name]]),
        }
        if name in found:
            entry["tokens_per_second"] = spread([tokens / t for t in times])
            entry["next_token"] = found[name]
            if found[name] != found["jdsi"]:
                warn(f"warning: the next token of {name} is {found[name]}, that of jdsi {found['jdsi']}")
        contenders[name] = entry
    return {
        "contenders": contenders,
        "share_of_matmul_rate": {name: Ratio.of(rate, rates["matmul"]) for name, rate in rates.items()},
        "jdsi_speed_over": {n: Ratio.of(figures[n], figures["jdsi"]) for n in found if n != "jdsi"},
    }


def _table(result: dict[str, Any]) -> list[list[str]]:
    rows = [["contender", "time", "tokens/s", "GFLOP/s", "share of the limit", "speed of jdsi over it", "next token"]]
    for name, entry in result["contenders"].items():
        speed = entry.get("tokens_per_second")
        rows.append(
            [
                name,
                f"{entry['seconds']['median'] * 1e3:.1f} ms",
                f"{speed['median']:.0f}" if speed else "",
                f"{entry['gigaflops_per_second']['median']:.1f}",
                "" if name == "matmul" else ratio_text(result["share_of_matmul_rate"][name]),
                ratio_text(result["jdsi_speed_over"].get(name)),
                str(entry.get("next_token", "")),
            ]
        )
    return rows
