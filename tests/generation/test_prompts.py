"""Every form a prompt may take, and a PromptError for everything else."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jdsi.errors import PromptError
from jdsi.generation import pad_rows
from jdsi.generation.prompts import as_list, encode, encode_rows

VOCAB = 300
HELLO = {"role": "user", "content": "a b"}


@functools.cache
def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Knows the words `a`, `b` and `<s>`, and no token for any other."""
    inner = Tokenizer(models.WordLevel({"a": 1, "b": 2, "<s>": 3}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner)
    made.chat_template = template
    return made


def encoded(prompts) -> list[list[int]]:
    template = "<s>{% for m in messages %} {{ m['content'] }}{% endfor %}"
    return [encode(prompt, tokenizer(template), VOCAB) for prompt in as_list(prompts)]


ARRAYS = [np.asarray, jnp.asarray, torch.tensor]


@pytest.mark.parametrize(
    ("prompts", "ids"),
    [
        ("a b", [[1, 2]]),
        (["a b", "b"], [[1, 2], [2]]),
        (np.array(["a", "b"]), [[1], [2]]),
        ([5, 9, 2], [[5, 9, 2]]),
        ((5, 9, 2), [[5, 9, 2]]),
        (range(3), [[0, 1, 2]]),
        ([np.int64(5), 9], [[5, 9]]),
        ([[5, 9], [2]], [[5, 9], [2]]),
        ([[5, 9], "a"], [[5, 9], [1]]),
        ([HELLO], [[3, 1, 2]]),
        ([[HELLO], [HELLO, HELLO]], [[3, 1, 2], [3, 1, 2, 1, 2]]),
        (np.array([5, 9], object), [[5, 9]]),
    ],
)
def test_forms_of_a_prompt(prompts, ids):
    assert encoded(prompts) == ids


@pytest.mark.parametrize("array", ARRAYS)
def test_arrays_of_any_library_are_ids(array):
    assert encoded(array([5, 9, 2])) == [[5, 9, 2]]
    assert encoded(list(array([5, 9, 2]))) == [[5, 9, 2]]
    assert encoded(array([[5, 9], [2, 1]])) == [[5, 9], [2, 1]]
    assert encoded([array([5, 9]), array([2])]) == [[5, 9], [2]]
    assert encoded([list(array([5, 9])), [2]]) == [[5, 9], [2]]
    assert all(type(token) is int for token in encoded(array([5, 9]))[0])


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        (5, "an int"),
        (5.0, "a float"),
        (None, "None"),
        ([None], "None"),
        ([5.0], "a float"),
        ([5, "a"], "an int"),
        ([True, False], "a bool"),
        (np.array([1.0, 2.0]), "a float"),
        (np.array(5), "a ndarray"),
        (b"ab", "a bytes"),
        ([b"ab"], "a bytes"),
        (bytearray(b"ab"), "a bytearray"),
        (memoryview(b"ab"), "a memoryview"),
        ({1, 2}, "a set"),
        (HELLO, "a dict"),
        ([[5, None]], "a list with None in it"),
        ([[5, True]], "a list with a bool in it"),
        (np.zeros((2, 2, 2), int), "a list with a list in it"),
        ([["a", "b"]], "a list with a str in it"),
    ],
)
def test_what_is_no_prompt_is_named(prompts, named):
    with pytest.raises(PromptError, match=f"is {named}; it must be text, a list of token ids"):
        encoded(prompts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\ud800b", r"prompt has half a surrogate pair, U\+D800, at character 1"),
        ("unknown", "prompt cannot be encoded by the tokenizer: .*UNK"),
        ("", "prompt is empty"),
    ],
    ids=ascii,
)
def test_text_that_cannot_be_encoded(text, message):
    with pytest.raises(PromptError, match=message):
        encode(text, tokenizer(), VOCAB)
    with pytest.raises(PromptError, match=message):
        encode([{"role": "user", "content": text}], tokenizer("{{ messages[0]['content'] }}"), VOCAB)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "template refuses: roles must alternate"),
        ("{{ messages[0]['tools'] + 'x' }}", "template refuses: .*'tools'"),
        ("{{ messages[0]['content'] + 1 }}", "template refuses: .*concatenate"),
        ("{% if %}", "template refuses"),
        (None, "has no chat template"),
    ],
)
def test_a_chat_that_the_template_refuses(template, message):
    with pytest.raises(PromptError, match=f"^chat 3 .*{message}"):
        encode([HELLO], tokenizer(template), VOCAB, name="chat 3")


def test_text_and_chats_need_a_tokenizer_and_messages_their_keys():
    with pytest.raises(PromptError, match="prompt is text, and the model came without"):
        encode("a", None, VOCAB)
    with pytest.raises(PromptError, match="prompt is a chat, and the model came without"):
        encode([HELLO], None, VOCAB)
    with pytest.raises(PromptError, match=r"keys \['1', 'role'\]"):
        encode([{"role": "user", 1: 2}], tokenizer("x"), VOCAB)


@pytest.mark.parametrize("array", [list, *ARRAYS])
def test_rows_of_ids(array):
    assert encode_rows(array([[5, 9], [2, 1]]), VOCAB) == [[5, 9], [2, 1]]
    assert encode_rows([array([5, 9, 7]), array([2])], VOCAB) == [[5, 9, 7], [2]]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([5, 9, 2], "row 0 of tokens is an int"),
        (np.array([5, 9, 2]), "row 0 of tokens is an int"),
        (["text"], "row 0 of tokens is a str"),
        ("text", "tokens is a str"),
        (5, "tokens is an int"),
        ([[5], [HELLO]], "row 1 of tokens is a list"),
        ([[5], [2.0]], "row 1 of tokens is a list"),
        (np.zeros((1, 2, 2), int), "row 0 of tokens is a list"),
        ([], "tokens has no row"),
    ],
)
def test_what_is_not_rows_of_ids_is_told_so(tokens, message):
    with pytest.raises(PromptError, match=f"{message}.*rows of token ids, such as"):
        encode_rows(tokens, VOCAB)


def test_rows_that_are_empty_or_outside_the_vocabulary():
    with pytest.raises(PromptError, match="row 1 of tokens is empty"):
        encode_rows([[5], []], VOCAB)
    with pytest.raises(PromptError, match="row 1 of tokens has token id 300; the vocabulary is 0 to 299"):
        encode_rows([[5], [300]], VOCAB)


def test_rows_are_padded_on_the_right():
    padded = pad_rows([[1, 2, 3], (), np.array([4])], 4, -1)
    assert padded.dtype == np.int32
    assert padded.tolist() == [[1, 2, 3, -1], [-1] * 4, [4, -1, -1, -1]]
    with pytest.raises(ValueError, match="broadcast"):
        pad_rows([[1, 2]], 1)
