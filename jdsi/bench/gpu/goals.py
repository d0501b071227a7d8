"""What the project sets out to reach on a Hopper GPU, beside what a report found."""

import dataclasses
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Goal:
    """One figure to reach.

    Attributes:
        name: what it is about.
        wanted: the least value.
        stage: where it is measured.
        what: pattern that the names of its cases match.
        figure: the value of a result, `None` where the result has none.
        by: whose results count.
    """

    name: str
    wanted: float
    stage: str
    what: str
    figure: Callable[[Result], float | None]
    by: Sequence[str] = ("kernels",)


def _share(result: Result) -> float | None:
    return result["share"]["median"] if result.get("share") else None


def _over(other: str) -> Callable[[Result], float | None]:
    def figure(result: Result) -> float | None:
        ratio = result.get("over", {}).get(other)
        return None if ratio is None else ratio["median"]

    return figure


_KERNELS = ("pallas", "triton")
_ONE = "batch 1(, again)?$"
GOALS: tuple[Goal, ...] = (
    Goal("batch-1 decoding of the 8B shape: share of a copy's bandwidth", 0.85, "decode/llama-8b", _ONE, _share),
    Goal("the same over torch.compile", 1.3, "decode/llama-8b", _ONE, _over("torch.compile")),
    Goal("products of up to 10 tokens over cuBLAS", 1.2, "speed/linear", r"T=(\d|10) ", _over("xla"), _KERNELS),
    Goal("prefill attention over cuDNN", 1.0, "speed/attention", r" S=\d+", _over("cudnn"), _KERNELS),
    Goal("int8 over bfloat16, all products of a step", 1.7, "quantized", _ONE, _over("bfloat16"), ("int8",)),
    Goal("int4 over bfloat16, all products of a step", 2.5, "quantized", _ONE, _over("bfloat16"), ("int4",)),
    Goal("streaming from host memory: share of a pinned copy", 0.9, "streaming", "", _share),
)


def goals_of(report: Mapping[str, Any], goals: Sequence[Goal] = GOALS) -> list[dict[str, Any]]:
    """For each goal what was found: the worst case, the median of all, and by how much they meet or miss it.

    A rehearsal, or a report that lacks the figures, meets and misses nothing.
    """
    return [_outcome(goal, [] if report.get("rehearsal") else list(_figures(goal, report))) for goal in goals]


def _figures(goal: Goal, report: Mapping[str, Any]) -> Iterator[tuple[float, str]]:
    for stage in report["stages"]:
        for result in stage["results"] if stage["name"] == goal.stage else ():
            counts = result["by"] in goal.by and re.search(goal.what, result["what"])
            if counts and (figure := goal.figure(result)) is not None:
                yield figure, result["what"]


def _outcome(goal: Goal, found: Sequence[tuple[float, str]]) -> dict[str, Any]:
    outcome: dict[str, Any] = {"goal": goal.name, "wanted": goal.wanted}
    if not found:
        return outcome | {"met": None}
    worst, where = min(found)
    return outcome | {
        "met": worst >= goal.wanted,
        "worst": worst,
        "where": where,
        "median": statistics.median(figure for figure, _ in found),
        "cases": len(found),
        "by": worst / goal.wanted - 1,
    }
