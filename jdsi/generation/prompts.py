"""Prompts as users give them (text, chat messages, token ids) to token ids."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jdsi.errors import PromptError

from .chat import Chat

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Chat
"""Text; token ids; chat messages `{"role": ..., "content": ...}`; or those with more for the chat template."""

_PROMPT = "it must be text, a list of token ids, a list of chat messages or a Chat"
_ROWS = "forward takes rows of token ids, such as [[5, 9, 2]]"


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts; one prompt becomes a list of one.

    Token ids may be an array of any library, or a list of such scalars; the rows of a 2-D array are prompts.

    Raises:
        PromptError: `prompts` is neither text nor a sequence.
    """
    if isinstance(prompts, str | Chat):
        return [prompts]
    items = _items(prompts)
    if items is None:
        raise PromptError(f"the prompt is {_kind(prompts)}; {_PROMPT}, or a list of these")
    if items and (all(map(_is_id, items)) or all(isinstance(item, Mapping) for item in items)):
        return [items]
    return items


def encode(prompt: Prompt, tokenizer: Any, vocab_size: int, *, name: str = "prompt", answer: bool = True) -> list[int]:
    """Token ids of one prompt.

    Args:
        prompt: text gets the tokenizer's special tokens; a chat goes through its chat template, with the opening of the
            assistant's turn appended; ids are taken as they are.
        answer: whether a chat gets that opening, where it does not say so itself.
        tokenizer: a `transformers` tokenizer, or `None`.
        vocab_size: ids must be below it.
        name: what error messages call the prompt.

    Raises:
        PromptError: empty prompt, ids out of range, text without a tokenizer or that it cannot encode, a chat without a
            chat template, or that is incomplete or refused by it.
    """
    if isinstance(prompt, str):
        return _checked(_tokenize(prompt, tokenizer, name), vocab_size, name)
    if isinstance(prompt, Chat):
        if not answer and prompt.add_generation_prompt is None:
            prompt = dataclasses.replace(prompt, add_generation_prompt=False)
        text = _render(prompt, tokenizer, name)
        return _checked(_tokenize(text, tokenizer, name, add_special_tokens=False), vocab_size, name)
    items = _items(prompt)
    if items is None:
        raise PromptError(f"{name} is {_kind(prompt)}; {_PROMPT}")
    if items and all(isinstance(item, Mapping) for item in items):
        return encode(Chat(items), tokenizer, vocab_size, name=name, answer=answer)
    for item in items:
        if not _is_id(item):
            raise PromptError(f"{name} is {_kind(prompt)} with {_kind(item)} in it; {_PROMPT}")
    return _checked(items, vocab_size, name)


def encode_rows(tokens: Any, vocab_size: int) -> list[list[int]]:
    """Token ids of the rows of a batch, which may differ in length.

    Args:
        tokens: a 2-D integer array of any library, or a sequence of sequences of ids.
        vocab_size: ids must be below it.

    Raises:
        PromptError: not rows of ids, no row, an empty row, or ids out of range.
    """
    rows = None if isinstance(tokens, str) else _items(tokens)
    if rows is None:
        raise PromptError(f"tokens is {_kind(tokens)}; {_ROWS}")
    if not rows:
        raise PromptError(f"tokens has no row; {_ROWS}")
    checked = []
    for index, row in enumerate(rows):
        ids = None if isinstance(row, str) else _items(row)
        if ids is None or not all(map(_is_id, ids)):
            raise PromptError(f"row {index} of tokens is {_kind(row)} and not ids; {_ROWS}")
        checked.append(_checked(ids, vocab_size, f"row {index} of tokens"))
    return checked


def _checked(ids: Sequence[Any], vocab_size: int, name: str) -> list[int]:
    if not ids:
        raise PromptError(f"{name} is empty; it needs at least one token")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise PromptError(f"{name} has token id {token}; the vocabulary is 0 to {vocab_size - 1}")
    return [int(token) for token in ids]


def encoding(texts: Sequence[str], tokenizer: Any, name: str, **options: Any) -> Mapping[str, list[int]]:
    """What a tokenizer makes of a text or of a pair of texts, for instance their `input_ids` and `token_type_ids`.

    Raises:
        PromptError: there is no tokenizer, or it cannot encode them.
    """
    if tokenizer is None:
        raise PromptError(f"{name} is text, and the model came without a tokenizer; give token ids or `tokenizer=`")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = f"U+{ord(text[error.start]):04X}"
            raise PromptError(f"{name} has half a surrogate pair, {code}, at character {error.start}") from error
    with _refusals(f"{name} cannot be encoded by the tokenizer"):
        return tokenizer(*texts, **options)


def _tokenize(text: str, tokenizer: Any, name: str, **options: Any) -> list[int]:
    return encoding([text], tokenizer, name, **options)["input_ids"]


def _render(chat: Chat, tokenizer: Any, name: str) -> str:
    if tokenizer is None:
        raise PromptError(f"{name} is a chat, and the model came without a tokenizer; give token ids or `tokenizer=`")
    with _refusals(f"{name} is a chat that the model's chat template refuses"):
        return chat.render(tokenizer, name)


@contextlib.contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Turns what a tokenizer or a template raises, which is of any type, into a `PromptError`."""
    try:
        yield
    except (ImportError, PromptError):  # say what to install, and what to change
        raise
    except Exception as error:  # tokenizers and templates raise types of their own
        raise PromptError(f"{what}: {error}") from error


def _items(value: Any) -> list[Any] | None:
    """The items of a sequence or of an array of any library, scalars as Python's own; `None` if it is neither."""
    value = _plain(value)
    if isinstance(value, str | bytes | bytearray | memoryview) or not isinstance(value, Sequence):
        return None
    return [_plain(item) for item in value]


def _plain(value: Any) -> Any:
    if isinstance(value, str | memoryview) or not hasattr(value, "tolist"):
        return value
    return value.tolist()


def _is_id(item: object) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _kind(value: object) -> str:
    """The type of a value with its article, for messages."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"
