"""The tuning table: which implementation and tile sizes were measured fastest, by device, operator and shape bucket."""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jdsi.errors import ConfigError

Table = dict[str, dict[str, dict[str, dict[str, Any]]]]  # device kind, operator, bucket

PACKAGED = Path(__file__).with_name("tuning.json")


def user_table() -> Path:
    """Where `jdsi tune` writes: `$JDSI_TUNING`, by default a file in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("JDSI_TUNING") or cache / "jdsi" / "tuning.json")


def lookup(device: str, operator: str, bucket: str) -> Mapping[str, Any] | None:
    """The entry `{"implementation", "config", "microseconds"}`; the user's table goes before the package's."""
    for path in (user_table(), PACKAGED):
        entry: Any = _read(path)
        for key in (device, operator, bucket):
            entry = entry.get(key, {}) if isinstance(entry, dict) else None
        if entry == {}:
            continue
        if not isinstance(entry, dict) or not _is_config(entry.get("config")):
            raise ConfigError(
                f"tuning table {path}: the entry {device!r}, {operator!r}, {bucket!r} is damaged: {entry!r}"
            )
        return entry
    return None


def _is_config(config: Any) -> bool:
    if config is None:
        return True
    return isinstance(config, dict) and all(isinstance(value, bool | int | float | str) for value in config.values())


def record(path: Path, device: str, operator: str, bucket: str, entry: Mapping[str, Any]) -> None:
    """Adds one entry to the table at `path`, which is replaced as a whole, and never half."""
    _read.cache_clear()
    table = {**_read(path)} if path.exists() else {}
    table.setdefault(device, {}).setdefault(operator, {})[bucket] = dict(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", "utf-8")
    partial.replace(path)
    _read.cache_clear()


@functools.cache
def _read(path: Path) -> Table:
    try:
        table = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"tuning table {path}: {error}") from error
    if not isinstance(table, dict):
        raise ConfigError(f"tuning table {path}: an object by device is expected, not {type(table).__name__}")
    return table
