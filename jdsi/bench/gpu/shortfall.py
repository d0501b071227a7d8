"""At which arguments a report found kernels to fall short, for those that would tune them."""

from collections.abc import Mapping
from typing import Any

_SHARE, _OVER_XLA = 0.85, 1.0


def fell_short(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """By operator, the argument specs at which its kernel is far from the device's limit or behind XLA.

    Those at which most time is lost against the limit come first, and with them their operator.
    """
    found: list[tuple[float, str, str]] = []
    for stage in report["stages"]:
        for result in stage["results"]:
            if "operator" not in result or not result.get("share") or result["by"] not in ("pallas", "triton"):
                continue
            share, over = result["share"]["median"], result.get("over", {}).get("xla")
            if share < _SHARE or (over is not None and over["median"] < _OVER_XLA):
                lost = result["seconds"]["median"] * max(0.0, 1 - share)
                found.append((lost, result["operator"], result["what"]))
    cases: dict[str, list[str]] = {}
    for _, operator, what in sorted(found, reverse=True):
        if what not in cases.setdefault(operator, []):
            cases[operator].append(what)
    return cases
