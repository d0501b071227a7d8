"""Prompts as users give them (text, chat messages, token ids) to token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdsi.errors import PromptError

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text; token ids; or chat messages `{"role": ..., "content": ...}`."""


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts; one prompt becomes a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = _plain(prompts)
    if items and all(_is_id(item) or isinstance(item, Mapping) for item in items):
        return [items]
    return items


def encode(prompt: Prompt, tokenizer: Any, vocab_size: int, *, name: str = "prompt") -> list[int]:
    """Token ids of one prompt.

    Args:
        prompt: text gets the tokenizer's special tokens; messages go through its chat template, with the opening of the
            assistant's turn appended; ids are taken as they are.
        tokenizer: a `transformers` tokenizer, or `None`.
        vocab_size: ids must be below it.
        name: what error messages call the prompt.

    Raises:
        PromptError: empty prompt, ids out of range, text without a tokenizer, messages without a chat template.
    """
    if isinstance(prompt, str):
        ids = _need(tokenizer, name)(prompt)["input_ids"]
        if not ids:
            raise PromptError(f"{name} is empty; it needs at least one token")
    elif (
        isinstance(prompt, Sequence | np.ndarray) and all(isinstance(item, Mapping) for item in prompt) and len(prompt)
    ):
        ids = _encode_chat(prompt, _need(tokenizer, name), name)
    else:
        ids = _checked_ids(prompt, name)
    outside = [i for i in ids if not 0 <= i < vocab_size]
    if outside:
        raise PromptError(f"{name} has token id {outside[0]}; the vocabulary is 0 to {vocab_size - 1}")
    return ids


def _checked_ids(prompt: Any, name: str) -> list[int]:
    items = _plain(prompt)
    if not all(_is_id(item) for item in items):
        raise PromptError(f"{name} is {type(prompt).__name__}; it must be text, a list of token ids or chat messages")
    if not items:
        raise PromptError(f"{name} is empty; it needs at least one token")
    return [int(item) for item in items]


def _encode_chat(messages: Any, tokenizer: Any, name: str) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(f"{name} is a chat, and this model's tokenizer has no chat template; give text instead")
    for message in messages:
        if "role" not in message or "content" not in message:
            raise PromptError(f"{name} has a message with keys {sorted(message)}; each needs 'role' and 'content'")
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _plain(items: Any) -> list[Any]:
    """A list of the items of a sequence or of an array of any library; what is neither becomes its only item."""
    if hasattr(items, "tolist"):
        items = items.tolist()
    return list(items) if isinstance(items, Sequence) else [items]


def _need(tokenizer: Any, name: str) -> Any:
    if tokenizer is None:
        raise PromptError(f"{name} is text, and the model came without a tokenizer; give token ids or `tokenizer=`")
    return tokenizer


def _is_id(item: object) -> bool:
    return isinstance(item, int | np.integer) and not isinstance(item, bool)
