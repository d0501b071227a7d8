"""DeepSpeed's description of a checkpoint: a JSON object that lists the files of its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jdsi.errors import CheckpointError, ConfigError, nearest

from .config import read_json
from .matching import some

_KEYS = ("type", "checkpoints", "version", "parallelization", "tp_size", "mp_size", "base_dir", "dtype")


def weights_of(description: Mapping[str, Any] | str | Path) -> list[Path]:
    """The files that a description names; they must hold tensors under their Hugging Face names.

    Args:
        description: `{"type": ..., "checkpoints": [FILE, ...], "version": ..., "base_dir": ...}`, or the JSON file with
            it. Files are looked for in `base_dir`; without one in the working folder, then beside the description.

    Raises:
        ConfigError: a key is unknown, or the files are parts that were cut for tensor parallelism.
        CheckpointError: the description cannot be read, or a file is not there.
    """
    where = "checkpoint" if isinstance(description, Mapping) else f"checkpoint={str(description)!r}"
    content = description if isinstance(description, Mapping) else _read(Path(description).expanduser())
    for key in content:
        if key not in _KEYS:
            raise ConfigError(f"{where} has {key!r}{nearest(str(key), _KEYS)}; known: {', '.join(_KEYS)}")
    files = content.get("checkpoints")
    if content.get("parallelization", "pp") != "pp" or isinstance(files, Mapping):
        raise ConfigError(
            f"{where} names weights that are cut for tensor parallelism; give those of the whole model, which are cut "
            "while they are read"
        )
    if not isinstance(files, list) or not files or not all(isinstance(file, str) and file for file in files):
        raise ConfigError(f"{where} must have 'checkpoints', a list of files, and has {files!r}")
    folders = [Path(content["base_dir"])] if content.get("base_dir") else [Path()]
    if not content.get("base_dir") and not isinstance(description, Mapping):
        folders.append(Path(description).expanduser().parent)
    found = [next((f for folder in folders if (f := folder / file).is_file()), None) for file in files]
    if absent := [file for file, place in zip(files, found, strict=True) if place is None]:
        raise CheckpointError(f"{where} names files that are not in {some(map(str, folders))}: {some(absent)}")
    return [place for place in found if place is not None]


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint: {error}") from error
