"""Peak memory of loading and converting, against goals that depend on the checkpoint."""

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jdsi.converters import random_checkpoint
from jdsi.converters.config import load_family
from jdsi.converters.huggingface import parse_size
from jdsi.errors import ConfigError
from jdsi.models import groups_of

from .processes import ask
from .report import Report, spread, warn
from .shapes import ITEM_BYTES, check_dtypes, checkpoint, scratch, shape_config, sized_config

_LOADS = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
_TINY = "llama-tiny"
_LOAD_GOAL = 1.1
_CONSTANT = 300_000_000
_NOTES = (
    "Peak resident memory of a fresh process, less that of one that did the same to a model of 0.3 MB: what importing"
    " and starting up take.",
    f"Goals: loading, {_LOAD_GOAL} times the weights as kept; converting, the largest tensor group (a layer, the"
    f" embedding or the head)",
    f"and the largest file written (up to one shard), and {_CONSTANT / 1e6:.0f} MB.",
)


def bench_memory(
    *,
    shape: str = "llama-125m",
    gigabytes: float = 3.0,
    dtype: str = "bfloat16",
    max_shard_size: str = "500MB",
    rounds: int = 1,
    folder: str | os.PathLike[str] | None = None,
) -> Report:
    """Peak resident memory of loading a Hugging Face folder and of converting one, each in a fresh process.

    Args:
        shape: what is loaded, see `SHAPES`; kept in float32 from float32 and bfloat16, and in bfloat16.
        gigabytes: smallest size of the random checkpoint that is converted, in 10^9 bytes; 0 leaves converting out.
        dtype: of that checkpoint.
        max_shard_size: of the Hugging Face folder that is written.
        rounds: each figure is taken this often, and its largest counts.
        folder: where the checkpoints are made and deleted, 2.1 times `gigabytes`; the temporary folder by default.

    Raises:
        ConfigError: a number is out of range, the shape is unknown, or the disk is too small.
    """
    if rounds < 1 or gigabytes < 0:
        raise ConfigError(f"{rounds=} must be at least 1 and {gigabytes=} not negative")
    check_dtypes(dtype)
    shard = parse_size(max_shard_size)
    results = [_load(shape, stored, kept, rounds) for stored, kept in _LOADS]
    if gigabytes:
        results += _convert(gigabytes, dtype, shard, rounds, folder)
    settings = {
        "shape": shape,
        "gigabytes": gigabytes,
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "rounds": rounds,
    }
    return Report("memory", settings, results, _table(results), _NOTES)


def _load(shape: str, stored: str, kept: str, rounds: int) -> dict[str, Any]:
    warn(f"memory: load {stored} as {kept}")
    with checkpoint(None, shape, stored) as folder, checkpoint(None, _TINY, stored) as tiny:
        ask("load", folder=tiny, dtype=kept)  # Python compiles its bytecode once, which takes memory of its own
        baselines, answers = [], []
        for _ in range(rounds):
            baselines.append(ask("load", folder=tiny, dtype=kept)["peak"])
            answers.append(ask("load", folder=folder, dtype=kept))
    nbytes = answers[0]["bytes"]
    result = _result(f"load {stored} as {kept}", answers, baselines, {"weights": nbytes}, int(_LOAD_GOAL * nbytes))
    return result | {"over_weights": result["peak_over_baseline"] / nbytes}


def _convert(
    gigabytes: float,
    dtype: str,
    shard: int,
    rounds: int,
    parent: str | os.PathLike[str] | None,
) -> list[dict[str, Any]]:
    config = sized_config(gigabytes, ITEM_BYTES[dtype])
    results = []
    with scratch(parent) as folder:
        source = folder / "source"
        needed, free = int(2.1 * gigabytes * 1e9), shutil.disk_usage(folder).free
        if free < needed:
            raise ConfigError(f"{folder}: {needed:,} bytes are needed and {free:,} free; name another folder")
        warn(f"memory: writing {gigabytes:g} GB of random weights in {folder}")
        random_checkpoint(source, config, dtype=dtype, max_shard_size=shard)
        tiny = random_checkpoint(folder / "tiny", shape_config(_TINY), dtype=dtype)
        group = largest_group(source, ITEM_BYTES[dtype])
        for to in ("orbax", "hf"):
            warn(f"memory: convert to {to}")
            baselines, answers, largest_file = [], [], 0
            for _ in range(rounds):
                baselines.append(_convert_once(tiny, folder / to, shard)[0]["peak"])
                answer, largest_file = _convert_once(source, folder / to, shard)
                answers.append(answer)
            terms = {"largest_group": group, "largest_file": largest_file, "constant": _CONSTANT}
            label = f"convert {answers[0]['bytes'] / 1e9:.2f} GB to {to}"
            results.append(_result(label, answers, baselines, terms, sum(terms.values())))
    return results


def _convert_once(source: Path, target: Path, shard: int) -> tuple[dict[str, Any], int]:
    """The answer, and the size of the largest file written."""
    answer = ask("convert", source=source, destination=target, to=target.name, max_shard_size=shard)
    largest = max(file.stat().st_size for file in target.rglob("*") if file.is_file())
    shutil.rmtree(target)
    return answer, largest


def largest_group(folder: Path, itemsize: int) -> int:
    """Bytes, with values of `itemsize`, of the checkpoint's largest group: what a conversion has to hold at once."""
    spec = load_family(folder)[1]
    return max(sum(math.prod(info.shape) for info in infos.values()) for infos in groups_of(spec).values()) * itemsize


def _result(
    label: str, answers: list[dict[str, Any]], baselines: list[int], terms: Mapping[str, int], goal: int
) -> dict[str, Any]:
    # Against the smallest baseline: the doubt counts against us.
    over = max(answer["peak"] for answer in answers) - min(baselines)
    return {
        "what": label,
        "bytes": answers[0]["bytes"],
        "peak": spread([answer["peak"] for answer in answers]),
        "baseline": spread(baselines),
        "peak_over_baseline": over,
        "terms": dict(terms),
        "goal": goal,
        "within": over <= goal,
        "seconds": spread([answer["seconds"] for answer in answers]),
    }


def _table(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["what", "weights", "peak over baseline", "over weights", "goal", "made of", "within", "time"]]
    for result in results:
        terms = ", ".join(f"{name.replace('_', ' ')} {size / 1e6:.0f}" for name, size in result["terms"].items())
        rows.append(
            [
                result["what"],
                f"{result['bytes'] / 1e6:.0f} MB",
                f"{result['peak_over_baseline'] / 1e6:.0f} MB",
                f"{result['over_weights']:.3f}" if "over_weights" in result else "",
                f"{result['goal'] / 1e6:.0f} MB",
                terms,
                "yes" if result["within"] else "NO",
                f"{result['seconds']['median']:.1f} s",
            ]
        )
    return rows
