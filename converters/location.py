"""From what a user names to a folder or a config file on this machine, fetched from the hub if need be."""

import re
from pathlib import Path

from jdsi.errors import CheckpointError

from .config import CHAT_TEMPLATES, COMPANIONS, read_json
from .mistaken import GGUF
from .weight_files import files_named

PARTIAL = re.compile(r".*\.partial-[0-9a-f]{8}")
"""Names of folders that a conversion is still writing, or left when it was killed."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(path_or_hub_id: str | Path) -> Path:
    """The local folder of a checkpoint, downloaded if need be.

    Raises:
        CheckpointError: nothing is there, it is no folder of a checkpoint, or the hub cannot be reached.
    """
    if not str(path_or_hub_id):
        raise CheckpointError("'' is no folder and no hub id; give one")
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        if PARTIAL.fullmatch(path.absolute().name):
            raise CheckpointError(f"{path}: a conversion that did not finish; convert again")
        if not any(path.iterdir()):
            raise CheckpointError(f"{path}: the folder is empty")
        return path
    if path.suffix == ".gguf" and path.exists():
        raise CheckpointError(f"{path}: {GGUF}")
    if path.exists():
        raise CheckpointError(f"{path}: a file; give the folder that holds config.json and the weights")
    if not _HUB_ID.fullmatch(str(path_or_hub_id)):
        raise CheckpointError(f"{path}: no such folder")
    return _download(str(path_or_hub_id))


def resolve_setting(key: str, value: str | Path) -> Path:
    """As `resolve`, of what a setting says; its errors name the setting."""
    try:
        return resolve(value)
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error


def resolve_config(path_or_hub_id: str | Path) -> Path:
    """A config file, or the folder of one; of a hub id nothing but the config is downloaded. Errors as `resolve`."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_file() and path.suffix == ".json":
        return path
    if path.exists() or not _HUB_ID.fullmatch(str(path_or_hub_id)):
        return resolve(path_or_hub_id)
    return _download(str(path_or_hub_id), weights=False)


def _download(hub_id: str, *, weights: bool = True) -> Path:
    folder = _fetch(hub_id, ["config.json", *COMPANIONS, CHAT_TEMPLATES])
    if not weights:
        return folder
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if isinstance(named := config.get("transformers_weights"), str):
        folder = _fetch(hub_id, [named])
        if named.endswith(".json") and (folder / named).is_file():
            folder = _fetch(hub_id, sorted(files_named(folder / named)))
        return folder
    folder = _fetch(hub_id, ["model*.safetensors", "model*.index.json"])
    if not any(folder.glob("*.safetensors")):
        folder = _fetch(hub_id, ["pytorch_model*.bin", "pytorch_model*.index.json"])
    return folder


def _fetch(hub_id: str, patterns: list[str]) -> Path:
    """The folder of a hub id in the cache, with those of its files that have such names."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # network, authentication, naming: each has types of its own
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(
            f"{hub_id}: no such folder here, and it cannot be fetched from the Hugging Face Hub: {reason}"
        ) from error
