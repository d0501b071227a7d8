"""Token ids to text as they come."""

import copy
import re
from collections.abc import Sequence
from typing import Any, Protocol, Self

_WINDOW = 8
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"
# The characters that a byte-level vocabulary writes bytes as: printable ones as themselves, the others from 256 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(0x100) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}


class Tokenizer(Protocol):
    """The part of a `transformers` tokenizer that is used here."""

    added_tokens_decoder: Any

    def decode(self, token_ids: list[int], **kwargs: Any) -> Any: ...

    def convert_ids_to_tokens(self, ids: int) -> Any: ...

    def convert_tokens_to_ids(self, tokens: list[str]) -> Any: ...


class Detokenizer:
    """Emits the text of a growing sequence of tokens as soon as no later token can change it.

    The deltas of `add` and the rest from `flush` join to
    `tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)`. Only a window of the last few
    tokens is decoded each time, so the cost per token does not grow. It begins with tokens whose text is already out:
    they keep a decoder from taking the next token for the first of a text, whose leading space it would drop.

    A character of several tokens comes with the last of them. Byte-fallback tokens (`<0xE2>`) the tokenizer decodes a
    run at a time, with one U+FFFD for every byte of a run that is not UTF-8, so what it makes of a byte depends on all
    that follow. Here, as in SentencePiece, every character of a run counts as soon as it is whole, and each byte that
    belongs to none becomes one U+FFFD: the texts differ where a run is not UTF-8, and nowhere else.

    `tokenizers.decoders.DecodeStream` would not do: it raises at a run that is not UTF-8, repeats text of a prompt that
    ends inside a character, never gives what it holds back at the end, and needs a tokenizer in Rust.

    Args:
        tokenizer: a `transformers` tokenizer.
        prompt_ids: makes the text continue this prompt: it is the text of both less that of the prompt, of which a last
            unfinished character does not count. Without a prompt the text is that of the generated tokens on their own.

    Attributes:
        special: content of the tokens that are left out of the text, by id.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self.special: dict[int, str] = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._replacement = self._byte_tokens(_REPLACEMENT)
        self._ids: list[int] = []  # of whole characters, but for byte-level tokens at the end
        self._mark = 0  # where the window will begin
        self._emitted = 0  # characters of the window's text that are out
        self._unfinished: list[tuple[int, int]] = []  # byte-fallback tokens of a character, each with its byte
        for token_id in self._context(prompt_ids):
            self.add(token_id)

    def add(self, token_id: int) -> str:
        """The text that became certain with this token."""
        token = self._token(token_id)
        if token is None:
            return ""
        byte = _BYTE_TOKEN.fullmatch(token) if self._replacement else None
        if byte is None:
            return self._give_up_unfinished() + self._take([token_id])
        self._unfinished.append((token_id, int(byte[1], 16)))
        delta = ""
        while self._unfinished:
            ids, data = zip(*self._unfinished, strict=True)
            whole = _is_character(bytes(data))
            if whole is None:
                break
            delta += self._take(ids if whole else self._replacement)
            del self._unfinished[: len(ids) if whole else 1]
        return delta

    def flush(self) -> str:
        """The text held back, once no more tokens follow."""
        delta = self._give_up_unfinished()
        text = self._decode(self._ids)
        delta += text[self._emitted :]
        self._emitted = len(text)
        return delta

    def copy(self) -> Self:
        """One that goes on from here on its own."""
        other = copy.copy(self)
        other._ids, other._unfinished = list(self._ids), list(self._unfinished)
        return other

    def _take(self, token_ids: Sequence[int]) -> str:
        self._ids += token_ids
        text = self._certain(self._ids)
        delta = text[self._emitted :]
        self._emitted = max(self._emitted, len(text))
        if len(self._ids) - self._mark >= _WINDOW:
            self._slide()
        return delta

    def _give_up_unfinished(self) -> str:
        unfinished, self._unfinished = self._unfinished, []
        return "".join(self._take(self._replacement) for _ in unfinished)

    def _slide(self) -> None:
        """Forgets the tokens before the mark. The rest must have text of its own, or it could not serve as context."""
        text = self._certain(self._ids[self._mark :])
        if text:
            del self._ids[: self._mark]
            self._mark = len(self._ids)
            self._emitted = len(text)

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        kept: list[int] = []
        for token_id in map(int, reversed(prompt_ids)):
            if self._token(token_id) is None:
                continue
            kept.insert(0, token_id)
            if len(kept) >= _WINDOW and self._decode(kept):
                break
        return kept

    def _token(self, token_id: int) -> str | None:
        """A token as the vocabulary has it; `None` for those without text: special ones, and ids that have no token."""
        return None if token_id in self.special else self._tokenizer.convert_ids_to_tokens(token_id)

    def _byte_tokens(self, character: str) -> list[int]:
        """The byte-fallback tokens of a character; none if the tokenizer has no byte fallback."""
        found = self._tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in character.encode()])
        return found if None not in found and self._decode(found) == character else []

    def _certain(self, token_ids: list[int]) -> str:
        """The text of tokens, without a U+FFFD at the end that stands for the first bytes of a character."""
        text = self._decode(token_ids)
        if not text.endswith(_REPLACEMENT):
            return text
        end = "".join(map(self._tokenizer.convert_ids_to_tokens, token_ids[-3:]))[-3:]
        data = bytes(_BYTES.get(character, 0) for character in end)  # any other character is whole
        cut = any(_is_character(data[start:]) is None for start in range(len(data)))
        return text[:-1] if cut else text

    def _decode(self, token_ids: list[int]) -> str:
        if not token_ids:
            return ""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _is_character(data: bytes) -> bool | None:
    """Whether these bytes are a character in UTF-8; `None` if they are the first of one."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return None if error.start == 0 and error.reason == "unexpected end of data" else False
    return True
