"""The report as a file: whole at every moment, whatever happens to the program that writes it."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jdsi.errors import ConfigError

from .stage import Stage
from .stage_worker import plain

FORMAT = 1


class Journal:
    """Writes a report, anew with every finding: a stage is looked up by its name.

    Args:
        path: the file.
        about: what the report says of itself.

    Attributes:
        report: what is written.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self.report: dict[str, Any] = {"format": FORMAT, **about, "finished": False, "stages": []}
        self._entries: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as error:
            raise ConfigError(f"report {path} cannot be written: {error}") from error

    def plan(self, stages: Iterable[tuple[Stage, float]]) -> None:
        """Names all stages, each with its seconds, before any has begun."""
        for stage, seconds in stages:
            entry = {"name": stage.name, "title": stage.title, "limit": round(seconds, 1), "state": "waiting"}
            self._entries[stage.name] = {**entry, "results": []}
            self.report["stages"].append(self._entries[stage.name])
        self._write()

    def note(self, stage: Stage, **found: Any) -> None:
        """Sets values of a stage's entry."""
        self._entries[stage.name].update(plain(found))
        self._write()

    def add(self, stage: Stage, result: Mapping[str, Any]) -> None:
        """Adds a finding."""
        self._entries[stage.name]["results"].append(plain(result))
        self._write()

    def entry(self, stage: Stage) -> dict[str, Any]:
        """What is known of a stage."""
        return self._entries[stage.name]

    def close(self, **found: Any) -> None:
        """Adds what there is to say in the end."""
        self.report |= plain(found)
        self.report["finished"] = True
        self._write()

    def _write(self) -> None:
        partial = self.path.with_name(f".{self.path.name}.partial-{os.getpid()}")
        partial.write_text(json.dumps(self.report, indent=1, allow_nan=False) + "\n", "utf-8")
        partial.replace(self.path)


def read_report(path: Path) -> dict[str, Any]:
    """A report that a `Journal` wrote.

    Raises:
        ConfigError: there is none, or it is no report of ours.
    """
    try:
        report = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"report {path} cannot be read: {error}") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT or "stages" not in report:
        raise ConfigError(f"{path} is no report of `jdsi bench gpu`, or one of another version")
    return report
