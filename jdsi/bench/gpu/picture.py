"""The roofline of a measured report: how near everything comes to what the GPU's memory and its arithmetic allow."""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jdsi.errors import ConfigError

from .show import is_measured, title


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draws it into a file whose ending says the format.

    Raises:
        ConfigError: matplotlib is not installed, the report is not measured, or it lacks the limits.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a picture needs matplotlib, which is not installed: pip install 'jdsi[notebooks]'")
    if not is_measured(report):
        raise ConfigError("a picture is drawn of measured reports only; this is none")
    bandwidth, rate = _limits(report)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    points: dict[str, list[tuple[float, float]]] = {}
    for stage, intensity, reached in _points(report):
        points.setdefault(stage, []).append((intensity, reached))
    every = [intensity for found in points.values() for intensity, _ in found] or [1.0]
    ends = [min(every) / 2, max(*every, rate / bandwidth) * 2]
    corner = rate / bandwidth
    axes.plot([ends[0], corner, ends[1]], [ends[0] * bandwidth / 1e12, rate / 1e12, rate / 1e12], color="black")
    for stage, found in points.items():
        axes.scatter(*zip(*found, strict=True), label=stage, s=18)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="floating-point operations for each byte that must be moved",
        ylabel="TFLOP/s",
        title=f"{title(report)}\na copy moves {bandwidth / 1e9:.0f} GB/s, a product makes {rate / 1e12:.0f} TFLOP/s",
    )
    axes.grid(alpha=0.3, which="both")
    if points:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _limits(report: Mapping[str, Any]) -> tuple[float, float]:
    """Bytes and operations per second."""
    found = {
        result["what"]: result for stage in report["stages"] if stage["name"] == "limits" for result in stage["results"]
    }
    try:
        copy, product = found["copy"], found["matmul"]
        return copy["bytes"] / copy["seconds"]["median"], product["flops"] / product["seconds"]["median"]
    except (KeyError, TypeError):
        raise ConfigError("the report has no limits, without which there is no roofline") from None


def _points(report: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Stage, operations per byte and TFLOP/s of what ran on our kernels."""
    for stage in report["stages"]:
        for result in stage["results"]:
            counted = result.get("bytes") and result.get("flops") and result.get("seconds")
            if counted and result["by"] in ("pallas", "triton", "kernels") and result["seconds"]["median"] > 0:
                rate = result["flops"] / result["seconds"]["median"]
                yield stage["name"], result["flops"] / result["bytes"], rate / 1e12
