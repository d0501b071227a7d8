"""Loading a checkpoint's tokenizer and the ids that end its sequences."""

import json
import os
from pathlib import Path
from typing import Any

from jdsi.errors import CheckpointError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(source: str | os.PathLike[str], *, required: bool = False) -> Any:
    """The `transformers` tokenizer of a folder or hub id; `None` if the folder has none and none is required.

    Raises:
        CheckpointError: there is none though required, or it cannot be read.
    """
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        if required:
            raise CheckpointError(f"{folder} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}")
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the tokenizer of {source} cannot be read: {error}") from error


def load_eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end a sequence: of `generation_config.json` if it names any, else of `config.json`.

    Raises:
        CheckpointError: a file is not JSON.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            value = json.loads(path.read_text()).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is not a JSON object: {error}") from error
        if value is not None:
            return tuple(value) if isinstance(value, list) else (value,)
    return ()
