"""Prompts as the command line gives them."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jdsi.errors import PromptError


def read_prompts(
    texts: Sequence[str], files: Sequence[str], ids: Sequence[str], chat_files: Sequence[str], *, chat: bool
) -> list[Any]:
    """Prompts in the order: texts, texts in files, chats in files, token ids.

    Args:
        texts: as they are.
        files: names of files with text, in UTF-8; `-` is standard input.
        ids: token ids with commas between them.
        chat_files: names of files of JSON: a list of messages, or an object of the fields of `jdsi.Chat`.
        chat: makes messages of a user's of the texts.

    Raises:
        PromptError: a file cannot be read, holds no chat, or numbers are none.
    """
    found: list[Any] = [*texts, *map(_read_text, files)]
    if chat:
        found = [[{"role": "user", "content": text}] for text in found]
    found += map(_read_chat, chat_files)
    return [*found, *map(token_ids, ids)]


def token_ids(line: str, option: str = "--prompt-ids") -> list[int]:
    """Ids that an option names.

    Raises:
        PromptError: they are not numbers with commas between them.
    """
    try:
        return [int(part) for part in line.split(",")]
    except ValueError:
        raise PromptError(f"{option} {line!r} must be numbers with commas between them, as 5,6,7") from None


def _read_text(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"the prompt file {name} cannot be read: {error}") from error


def _read_chat(name: str) -> Any:
    from jdsi import Chat

    try:
        value = json.loads(sys.stdin.read() if name == "-" else Path(name).read_bytes())
    except (OSError, ValueError) as error:
        raise PromptError(f"the chat file {name} cannot be read: {error}") from error
    if not isinstance(value, list | dict):
        raise PromptError(f"the chat file {name} must hold a list of messages, or an object that has one as `messages`")
    try:
        return Chat.from_dict(value if isinstance(value, dict) else {"messages": value})
    except PromptError as error:
        raise PromptError(f"the chat file {name}: {error}") from error
