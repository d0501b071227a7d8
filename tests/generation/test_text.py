"""Detokenisation, stop strings and completions, with tokenizers trained on the spot."""

import functools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jdsi.errors import ConfigError, JdsiError
from jdsi.generation import (
    Completion,
    CompletionBuilder,
    Detokenizer,
    FinishCode,
    SamplingParams,
    StopStrings,
    TokenLogprob,
)

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and then the dog jumps over the fox",
    "naïve café — déjà vu, 日本語のテキスト и немного русского текста",
    "  indented code:\n\tfor i in range(10): print(i)  # don't",
] * 3
PIECES = ["👩‍👩‍👧", "e\u0301", "n\u0303", "🇩🇪", "日本", " ", "  ", "\n", "the", " dog", "é", "\ufffd", "😀", "▁", "<s>"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)
NAMES = ["byte_level", "metaspace", "byte_fallback"]


@functools.cache
def make(name: str) -> PreTrainedTokenizerFast:
    """Decoders as in GPT-2 and Llama 3, in T5, and in Llama 2."""
    special: list[Any] = ["<s>", "</s>", "<unk>"]
    if name == "byte_level":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif name == "metaspace":
        inner = Tokenizer(models.Unigram())
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        inner.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
        )
    inner.train_from_iterator(CORPUS, trainer)
    if name == "byte_fallback":
        # The trainer marks the byte tokens as special; in a checkpoint they are ordinary vocabulary.
        state = inner.model
        inner = Tokenizer(state)
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def decode(name: str, ids: list[int]) -> str:
    return str(make(name).decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def stream(name: str, ids: list[int], prompt_ids: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(make(name), prompt_ids or [])
    return [*(detokenizer.add(i) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_deltas_of_a_text_join_to_its_decoding(name, text):
    ids = make(name).encode(text)
    assert "".join(stream(name, ids)) == decode(name, ids)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(0, 60))
def test_deltas_of_any_tokens_join_to_their_decoding(name, seed, size):
    """Invalid UTF-8, special tokens and cut characters included."""
    ids = random.Random(seed).choices(range(len(make(name))), k=size)
    assert "".join(stream(name, ids)) == decode(name, ids)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(text=TEXTS, seed=st.integers(0, 2**32))
def test_text_continues_the_prompt(name, text, seed):
    ids = make(name).encode("the quick brown fox" + text)
    cut = random.Random(seed).randint(4, len(ids))
    if name == "byte_fallback":  # a prompt does not end inside a character
        while str(make(name).convert_ids_to_tokens(ids[cut - 1])).startswith("<0x"):
            cut -= 1
    whole = decode(name, ids)
    before = decode(name, ids[:cut]).removesuffix("\ufffd")
    assert before + "".join(stream(name, ids[cut:], ids[:cut])) == whole


def test_text_comes_as_soon_as_it_is_certain():
    ids = make("byte_level").encode("dog😀 dog")
    deltas = stream("byte_level", ids)
    emoji = next(i for i, d in enumerate(deltas) if "😀" in d)
    assert deltas[emoji] == "😀"
    assert deltas[emoji - 1] == ""
    assert all(deltas[emoji + 1 : -1])
    assert deltas[-1] == ""


@pytest.mark.parametrize("name", NAMES)
def test_cost_per_token_does_not_grow(name):
    """The window, not the text, is decoded; counted in tokens handed to the tokenizer, not in seconds."""
    tokenizer, decoded = make(name), [0]

    class Counting:
        added_tokens_decoder = tokenizer.added_tokens_decoder
        convert_ids_to_tokens = staticmethod(tokenizer.convert_ids_to_tokens)

        @staticmethod
        def decode(token_ids, **kwargs):
            decoded[0] += len(token_ids)
            return tokenizer.decode(token_ids, **kwargs)

    ids = tokenizer.encode("the quick brown fox jumps " * 200)
    detokenizer = Detokenizer(Counting())
    for token_id in ids:
        detokenizer.add(token_id)
    assert decoded[0] < 25 * len(ids)


def reference_stop(text: str, stop: list[str]) -> str:
    return text[: min((text.index(s) for s in stop if s in text), default=len(text))]


@given(
    parts=st.lists(st.text("ab", max_size=4), max_size=12),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_cut_the_text_wherever_it_is_split(parts, stop):
    matcher = StopStrings(stop)
    out = ""
    text = ""
    for part in parts:
        out += matcher.feed(part)
        text += part
        if matcher.matched is not None:
            break
        assert text.startswith(out)
        assert not any(s in out for s in stop)
    out += matcher.flush()
    # A longer stop string may begin before one that is complete; text is judged as it comes.
    assert out == reference_stop(text, stop)
    assert (matcher.matched is not None) == any(s in text for s in stop)


def run(params: SamplingParams, ids: list[int], finish: int = FinishCode.LENGTH) -> tuple[Completion, list[str]]:
    builder = CompletionBuilder(params, make("byte_level"))
    deltas = []
    for i, token in enumerate(ids):
        deltas.append(builder.add(token, finish if i == len(ids) - 1 else FinishCode.RUNNING))
        if builder.finish_reason:
            break
    return builder.completion(), deltas


def test_completion_ends_before_a_stop_string_over_several_tokens():
    ids = make("byte_level").encode("the lazy dog, and then STOP more")
    completion, deltas = run(SamplingParams(stop=["STOP"]), ids)
    assert completion.text == "".join(deltas) == "the lazy dog, and then "
    assert completion.finish_reason == "stop"
    assert completion.token_ids == ids[: len(completion.token_ids)]
    assert decode("byte_level", completion.token_ids).endswith("STOP")


def test_completion_gives_back_text_held_for_a_stop_string_that_never_came():
    ids = make("byte_level").encode("the dog ST")
    completion, deltas = run(SamplingParams(stop=["STOP"]), ids)
    assert completion.text == "".join(deltas) == "the dog ST"
    assert completion.finish_reason == "length"


def test_stop_token_is_in_the_ids_but_not_in_the_text():
    ids = make("byte_level").encode("the dog!")
    completion, _ = run(SamplingParams(stop_token_ids=[ids[-1]]), ids, FinishCode.STOP)
    assert completion == Completion("the dog", ids, "stop")


def test_stop_string_counts_only_from_min_new_tokens():
    ids = make("byte_level").encode("XXXX")
    completion, _ = run(SamplingParams(stop=["X"], min_new_tokens=3), ids)
    assert completion == Completion("XX", ids[:3], "stop")


def test_completion_without_tokenizer_has_ids_and_logprobs():
    builder = CompletionBuilder(SamplingParams(logprobs=1))
    builder.add(3, FinishCode.RUNNING, TokenLogprob(3, -0.5, [(3, -0.5), (4, -1.0)]))
    assert builder.finish_reason is None
    builder.add(5, FinishCode.STOP, TokenLogprob(5, -0.1, [(5, -0.1), (4, -3.0)]))
    assert builder.add(9) == ""
    expected = [TokenLogprob(3, -0.5, [(3, -0.5)]), TokenLogprob(5, -0.1, [(5, -0.1)])]
    assert builder.completion() == Completion("", [3, 5], "stop", expected)
    with pytest.raises(ConfigError, match="stop"):
        CompletionBuilder(SamplingParams(stop="x"))
    with pytest.raises(JdsiError, match=r"token 0 of the request .* not finite"):
        CompletionBuilder(SamplingParams()).add(0, FinishCode.ERROR)
    with pytest.raises(JdsiError, match=r"token 0 of prompt 7 .* not finite"):
        CompletionBuilder(SamplingParams(), name="prompt 7").add(0, FinishCode.ERROR)
