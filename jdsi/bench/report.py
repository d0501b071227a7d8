"""What every benchmark prints: where and how it ran, then one table, or one JSON object."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .rounds import Ratio

_PACKAGES = ("jdsi", "jax", "jaxlib", "flax", "numpy", "torch", "transformers")


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of one benchmark.

    Attributes:
        benchmark: its name.
        settings: what it was asked to do.
        results: one record per configuration, figures per round included.
        table: header and rows of text for people.
        notes: how to read the table, one line each.
        title: of the table.
        more: further tables, each with its title.
    """

    benchmark: str
    settings: Mapping[str, Any]
    results: Sequence[Mapping[str, Any]]
    table: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    title: str = ""
    more: Sequence[tuple[str, Sequence[Sequence[str]]]] = ()

    def as_dict(self) -> dict[str, Any]:
        """All but the tables, for `--json`, with the environment."""
        return {
            "benchmark": self.benchmark,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "environment": environment(),
            "settings": dict(self.settings),
            "results": list(self.results),
            "notes": list(self.notes),
        }


def processors() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """Versions, processor, memory and load: what a figure is worth nothing without."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "cpu": _cpu_model(),
        "cores": processors(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg(),
        "devices": _devices(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _devices() -> list[str]:
    import jax

    return [device.device_kind for device in jax.devices()]


def show(report: Report, *, as_json: bool) -> None:
    """Prints to standard output."""
    if as_json:
        json.dump(report.as_dict(), sys.stdout, default=_plain)
        sys.stdout.write("\n")
        return
    from rich.console import Console
    from rich.table import Table

    about = environment()
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    # The width of a file or a pipe is unknown, and a table must not lose columns there.
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(f"{about['cpu']}, {about['cores']} cores, load {about['load_average'][0]:.1f}; {versions}")
    for title, (head, *rows) in ((report.title, report.table), *report.more):
        table = Table(*head, title=title or None, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for note in report.notes:
        console.print(note)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def ratio_text(ratio: Ratio | None) -> str:
    """`median (smallest to largest)`."""
    return "" if ratio is None else f"{ratio.median:.2f} ({ratio.minimum:.2f} to {ratio.maximum:.2f})"


def spread(figures: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all the figures of one contender."""
    return {
        "median": statistics.median(figures),
        "minimum": min(figures),
        "maximum": max(figures),
        "rounds": list(figures),
    }


def warn(text: str) -> None:
    """A line on standard error: progress, or what makes the figures doubtful."""
    sys.stderr.write(f"{text}\n")


def warn_if_busy() -> None:
    """Says so when something else is using the machine."""
    load = os.getloadavg()[0]
    if load > max(1.0, 0.5 * processors()):
        warn(f"warning: the load average is {load:.1f} on {processors()} cores; other work will distort these figures")
