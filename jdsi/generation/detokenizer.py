"""Token ids to text as they come."""

import re
from collections.abc import Sequence
from typing import Any, Protocol

_WINDOW = 8
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer(Protocol):
    """The part of a `transformers` tokenizer that is used here."""

    added_tokens_decoder: Any

    def decode(self, token_ids: list[int], **kwargs: Any) -> Any: ...

    def convert_ids_to_tokens(self, ids: int) -> Any: ...


class Detokenizer:
    """Emits the text of a growing sequence of tokens as soon as no later token can change it.

    The deltas of `add` and the rest from `flush` join to
    `tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)`. Only a window of the last few
    tokens is decoded each time, so the cost per token does not grow. It begins with tokens whose text is already out:
    they keep a decoder from taking the next token for the first of a text, whose leading space it would drop.

    Two kinds of text can still change and are held back: a replacement character at the end, which may be the first
    bytes of a character, and a run of byte-fallback tokens (`<0xE2>`), which decodes as one and so depends on its last.

    Args:
        tokenizer: a `transformers` tokenizer.
        prompt_ids: makes the text continue this prompt, so that joining it to the prompt's text keeps the space between
            them; without it the text is that of the generated tokens on their own.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._special = special_token_ids(tokenizer)
        self._ids = self._context(prompt_ids)
        self._mark = len(self._ids)  # a later start of the window, at which no character was cut
        self._emitted = len(_settled(self._decode(self._ids)))

    def add(self, token_id: int) -> str:
        """The text that became certain with this token."""
        if token_id in self._special:
            return ""
        self._ids.append(token_id)
        if _BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(token_id) or ""):
            return ""
        text = self._decode(self._ids)
        settled = _settled(text)
        delta = settled[self._emitted :]
        self._emitted = max(self._emitted, len(settled))
        if len(settled) == len(text) and len(self._ids) - self._mark >= _WINDOW:
            self._slide()
        return delta

    def flush(self) -> str:
        """The text held back, once no more tokens follow."""
        text = self._decode(self._ids)
        delta = text[self._emitted :]
        self._emitted = len(text)
        return delta

    def _slide(self) -> None:
        """Forgets the tokens before the mark. The rest must have text of its own, or it could not serve as context."""
        text = self._decode(self._ids[self._mark :])
        if text:
            del self._ids[: self._mark]
            self._mark = len(self._ids)
            self._emitted = len(text)

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        kept: list[int] = []
        for token_id in reversed(prompt_ids):
            if token_id in self._special:
                continue
            kept.insert(0, int(token_id))
            if len(kept) >= _WINDOW and self._decode(kept):
                break
        return kept

    def _decode(self, token_ids: list[int]) -> str:
        if not token_ids:
            return ""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def special_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that `skip_special_tokens` leaves out."""
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)


def _settled(text: str) -> str:
    """`text` without a last replacement character, which stands for up to three bytes of an unfinished character."""
    return text[:-1] if text.endswith("�") else text
