"""Loading a checkpoint's tokenizer."""

import os
from pathlib import Path
from typing import Any

from jdsi.converters.config import COMPANIONS, read_json
from jdsi.errors import CheckpointError

_NO_TOKENIZER_ALONE = {
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
}
_TOKENIZER_FILES = tuple(name for name in COMPANIONS if name not in _NO_TOKENIZER_ALONE)


def load_tokenizer(source: str | os.PathLike[str], *, required: bool = False) -> Any:
    """The `transformers` tokenizer of a folder or hub id; `None` if the folder has none and none is required.

    Raises:
        CheckpointError: there is none though required, or it cannot be read.
    """
    folder = Path(source)
    if folder.is_dir():
        if not any((folder / name).exists() for name in _TOKENIZER_FILES):
            if required:
                raise CheckpointError(f"{folder} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}")
            return None
        if (folder / "tokenizer_config.json").exists():
            read_json(folder / "tokenizer_config.json")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source))
    except Exception as error:  # a damaged file raises nearly anything
        raise CheckpointError(f"the tokenizer of {source} cannot be read: {error}") from error
