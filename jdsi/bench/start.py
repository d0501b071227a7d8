"""How long a user waits for the first token: with an empty compilation cache, and with a filled one."""

import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jdsi.errors import ConfigError

from .processes import ask
from .report import Report, ratio_text, spread, warn, warn_if_busy
from .rounds import Ratio
from .shapes import checkpoint, scratch

_STAGES = ("interpreter", "import", "load", "first_token")
_NOTES = (
    "cold: empty compilation cache. warm: a second process with the cache that the cold one filled. Seconds, medians.",
    "interpreter: starting Python and ending the process. first token: prefill, and compiling both prefill and decoding"
    " or reading them from the cache.",
    "The checkpoint and the installed packages are in the page cache in both: one process ran before.",
)


def bench_start(
    model: str | None = None, *, shape: str = "llama-125m", prompt: int = 32, rounds: int = 3, dtype: str = "float32"
) -> Report:
    """Seconds to the first token after a cold and a warm start, each in a fresh process, cold and warm in turn.

    Args:
        model: folder or hub id; by default random weights of `shape`.
        shape: see `SHAPES`.
        prompt: tokens of the prompt.
        rounds: of one cold and one warm start.
        dtype: of the random weights on disk; the engine chooses its own.

    Raises:
        ConfigError: a number is not positive or the shape is unknown.
    """
    if min(prompt, rounds) < 1:
        raise ConfigError(f"{prompt=} and {rounds=} must be positive")
    warn_if_busy()
    answers: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    with checkpoint(model, shape, dtype) as folder, scratch() as caches:
        _once(folder, caches / "warm-up", prompt)
        for r in range(rounds):
            warn(f"start: round {r + 1} of {rounds}")
            for name in answers:
                answers[name].append(_once(folder, caches / str(r), prompt))
            shutil.rmtree(caches / str(r), ignore_errors=True)
    results = [_result(name, runs) for name, runs in answers.items()]
    totals = [result["total"]["rounds"] for result in results]
    results.append({"start": "cold over warm", "ratio": Ratio.of(*totals)})
    settings = {"model": model or shape, "prompt": prompt, "rounds": rounds, "dtype": dtype}
    return Report("start", settings, results, _table(results), _NOTES)


def _once(folder: Path, cache: Path, prompt: int) -> dict[str, Any]:
    begin = time.perf_counter()
    answer = ask("start", folder=folder, cache=cache, prompt=list(range(1, prompt + 1)))
    whole = time.perf_counter() - begin
    return answer | {"seconds": {"interpreter": whole - sum(answer["seconds"].values()), **answer["seconds"]}}


def _result(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    stages = {stage: spread([run["seconds"][stage] for run in runs]) for stage in (*_STAGES, "second_token")}
    return {
        "start": name,
        "stages": stages,
        "total": spread([sum(run["seconds"][stage] for stage in _STAGES) for run in runs]),
        "cache_hits": [run["hits"] for run in runs],
        "cache_misses": [run["misses"] for run in runs],
        "tokens": runs[0]["tokens"],
    }


def _table(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    cold, warm, ratio = results
    titles = [stage.replace("_", " ") for stage in _STAGES]
    rows = [["start", *titles, "together", "cache hits", "misses", "cold over warm"]]
    for result in (cold, warm):
        rows.append(
            [
                result["start"],
                *(f"{result['stages'][stage]['median']:.2f}" for stage in _STAGES),
                f"{result['total']['median']:.2f}",
                f"{statistics.median(result['cache_hits']):.0f}",
                f"{statistics.median(result['cache_misses']):.0f}",
                ratio_text(ratio["ratio"]) if result is warm else "",
            ]
        )
    return rows
