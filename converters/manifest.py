"""`jdsi.json`, which makes a folder a checkpoint of ours: it is written last, so a folder without it is not one."""

import json
from pathlib import Path
from typing import Any

from jdsi.errors import CheckpointError

from .config import read_json

MANIFEST = "jdsi.json"


def write_manifest(folder: Path, kind: str, version: int, **content: Any) -> None:
    """Write the manifest of a folder whose other files of weights are complete."""
    manifest = {"format": kind, "version": version, **content, "complete": True}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def read_manifest(folder: Path, kind: str, version: int) -> dict[str, Any]:
    """The manifest of a folder of one kind.

    Raises:
        CheckpointError: it is absent, damaged, unfinished, or of another kind or version.
    """
    file = folder / MANIFEST
    manifest = read_json(file)
    if manifest.get("format") != kind or manifest.get("version") != version:
        raise CheckpointError(
            f"{file}: format {manifest.get('format')!r} version {manifest.get('version')!r}; readable is "
            f"{kind!r} version {version}"
        )
    if manifest.get("complete") is not True:
        raise CheckpointError(f"{file}: the conversion that wrote it did not finish")
    return manifest
