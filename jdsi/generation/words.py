"""How a tokenizer cuts a word, wherever it stands in a text."""

from typing import Any

_ANCHORS = ("\n", "(", "~", "0")  # what a word is put behind, the first that is cut off from it


def ways_to_write(word: str, tokenizer: Any) -> list[tuple[int, ...]]:
    """Token ids of a word in the midst of a text, without a space in front of it and with one.

    A model can always put a word together from other tokens than these, such as letters.
    """
    word = word.lstrip(" ") or word
    found = (_inside(text, tokenizer) for text in (word, f" {word}"))
    return list(dict.fromkeys(ids for ids in found if ids))


def _inside(text: str, tokenizer: Any) -> tuple[int, ...]:
    for anchor in _ANCHORS:
        before, whole = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in (anchor, anchor + text))
        if whole[: len(before)] == before and len(whole) > len(before):
            return tuple(whole[len(before) :])
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
