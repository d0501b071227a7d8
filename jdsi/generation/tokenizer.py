"""Loading a checkpoint's tokenizer."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jdsi.converters.config import COMPANIONS, read_json
from jdsi.converters.location import resolve_config
from jdsi.converters.mistaken import refuse_pointer
from jdsi.errors import CheckpointError, JdsiWarning

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

    A tokenizer that is a class of its own, in code beside its files, is not loaded: code of a checkpoint is never run.
    Where the files also name a class that transformers has, that one is loaded.

    Raises:
        CheckpointError: there is none though required, or it cannot be read.

    Warns:
        JdsiWarning: it is code, and none is required.
    """
    folder = resolve_config(Path(source) if isinstance(source, os.PathLike) else source)
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]
    if not files:
        if required:
            raise CheckpointError(f"{folder} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}")
        return None
    for file in files:
        refuse_pointer(file)
    if (folder / "tokenizer_config.json").exists() and (own := _own_class(read_json(folder / "tokenizer_config.json"))):
        reason = f"{folder}: the tokenizer is code of its own, {own}, which is not run"
        if required:
            raise CheckpointError(
                f"{reason}; give a tokenizer object, or a folder whose tokenizer is transformers' own"
            )
        warnings.warn(f"{reason}: prompts must be token ids, or a tokenizer be given", JdsiWarning, stacklevel=2)
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # a damaged file raises nearly anything
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        if isinstance(error, KeyError):
            reason = f"its files have no {reason}"
        raise CheckpointError(f"the tokenizer of {folder} cannot be read: {reason}") from error


def own_tokenizer(model: Any) -> Any:
    """The tokenizer of a checkpoint folder, or of the name that a `transformers` model goes by; `None` if it has none.

    Raises:
        CheckpointError: a folder's cannot be read.

    Warns:
        JdsiWarning: there is a name, and no tokenizer can be had by it.
    """
    if isinstance(model, Path):
        return load_tokenizer(model)
    if not (name := getattr(model, "name_or_path", "")):
        return None
    try:
        return load_tokenizer(name)
    except CheckpointError as error:
        warnings.warn(f"no tokenizer for {type(model).__name__} {name!r}: {error}", JdsiWarning, stacklevel=2)
        return None


def _own_class(config: Mapping[str, Any]) -> str | None:
    """The class, in code of the checkpoint's, that a tokenizer's config asks for, if transformers has none to use."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    known = config.get("tokenizer_class")
    if isinstance(known, str) and tokenizer_class_from_name(known) is not None:
        return None
    where = config.get("auto_map")
    named = where.get("AutoTokenizer") if isinstance(where, Mapping) else where
    classes = [named] if isinstance(named, str) else [name for name in named or () if isinstance(name, str)]
    return classes[-1] if classes else None
