"""Detokenisation, stop strings and completions, with tokenizers trained on the spot."""

import codecs
import copy
import functools
import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

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
    "  indented code:\n\tfor i in range(10): print(i)  # don't \ufffd",
] * 3
PIECES = ["👩‍👩‍👧", "e\u0301", "n\u0303", "🇩🇪", "日本", " ", "  ", "\n", "the", " dog", "é", "\ufffd", "😀", "▁", "<s>"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)
NAMES = ["byte_level", "metaspace", "byte_fallback", "unstripped", "word_piece", "slow"]
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
ADDED = "<｜tool｜>"
BYTE_TOKENS = [f"<0x{i:02X}>" for i in range(256)]
# The first bytes of a character (Unicode 15, table 3-7) at the end.
UNFINISHED = re.compile(
    rb"([\xc2-\xdf]|\xe0[\xa0-\xbf]?|[\xe1-\xec\xee\xef][\x80-\xbf]?|\xed[\x80-\x9f]?"
    rb"|\xf0([\x90-\xbf][\x80-\xbf]?)?|[\xf1-\xf3]([\x80-\xbf][\x80-\xbf]?)?|\xf4([\x80-\x8f][\x80-\xbf]?)?)\Z"
)


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd", error.start + 1


codecs.register_error("each byte", _each_byte)


class SlowTokenizer(PreTrainedTokenizer):
    """SentencePiece with byte fallback, as a tokenizer without Rust wraps it: the pieces of the Llama 2 kind."""

    def __init__(self, **options: Any):
        self._ids = make("byte_fallback").get_vocab()
        self._pieces = {i: piece for piece, i in self._ids.items()}
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str | None:
        return self._pieces.get(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return _text_of_pieces([t for t in tokens if t is not None])


@functools.cache
def make(name: str) -> Any:
    """Decoders as in GPT-2 and Llama 3, in T5, in Llama 2, in Gemma, in BERT, and SentencePiece in Python."""
    special: list[Any] = ["<s>", "</s>", "<unk>"]
    options = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if name == "slow":
        return SlowTokenizer(**options)
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
    elif name == "word_piece":
        inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece(prefix="##", cleanup=True)
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    else:
        inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *BYTE_TOKENS], show_progress=False)
    fallback = name in ("byte_fallback", "unstripped")
    # As in Llama 2 the end of a line is a byte token there.
    inner.train_from_iterator([re.sub("\n|\ufffd", "", text) if fallback else text for text in CORPUS], trainer)
    if fallback:
        # The trainer marks the byte tokens as special; in a checkpoint they are ordinary vocabulary.
        inner, trained = Tokenizer(inner.model), inner
        strip = [decoders.Strip(" ", 1, 0)] if name == "byte_fallback" else []
        inner.normalizer = trained.normalizer
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
    inner.add_tokens([ADDED])  # not a special one
    return PreTrainedTokenizerFast(tokenizer_object=inner, **options)


def decode(name: str, ids: list[int]) -> str:
    return str(make(name).decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def expected(name: str, ids: list[int], *, final: bool = True) -> str:
    """The text of tokens, by another way than the tokenizer's where bytes make characters.

    What they make is decoded at once, by Python; without `final` it is the text that no later token can change.
    """
    tokenizer = make(name)
    tokens = [t for i in ids if i not in tokenizer.all_special_ids and (t := tokenizer.convert_ids_to_tokens(i))]
    if name == "byte_level":
        data = b"".join(t.encode() if t == ADDED else bytes(BYTES[character] for character in t) for t in tokens)
        return (data if final else UNFINISHED.sub(b"", data)).decode(errors="replace")
    if name in ("byte_fallback", "unstripped", "slow"):
        return _text_of_pieces(tokens, final=final, strip=name != "unstripped")
    return decode(name, ids)


def _text_of_pieces(tokens: list[str], *, final: bool = True, strip: bool = True) -> str:
    data = b"".join(bytes([BYTE_TOKENS.index(t)]) if t in BYTE_TOKENS else t.encode() for t in tokens)
    text = (data if final else UNFINISHED.sub(b"", data)).decode(errors="each byte").replace("▁", " ")
    return text.removeprefix(" ") if strip else text


def stream(name: str, ids: list[int], prompt_ids: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(make(name), prompt_ids or [])
    return [*(detokenizer.add(i) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, seed=st.integers(0, 2**32), size=st.integers(0, 30))
def test_text_of_a_text_and_of_any_tokens_comes_as_soon_as_it_is_certain(name, text, seed, size):
    """Text, then invalid UTF-8, special tokens, cut characters and ids without a token; with any part as the prompt."""
    rng, tokenizer = random.Random(seed), make(name)
    of_text = tokenizer.encode(text, add_special_tokens=False) if name != "slow" else encode_slowly(text)
    assert expected(name, of_text) == decode(name, of_text)
    ids = of_text + rng.choices(range(len(tokenizer) + 3), k=size)
    if "\ufffd" not in expected(name, ids) or name == "byte_level":
        assert expected(name, ids) == decode(name, ids)
    cut = rng.randint(0, len(ids)) if seed % 3 else 0
    before = expected(name, ids[:cut], final=False)
    detokenizer, out = Detokenizer(tokenizer, ids[:cut]), ""
    for end, token_id in enumerate(ids[cut:], cut + 1):
        out += detokenizer.add(token_id)
        assert before + out == expected(name, ids[:end], final=False)
    assert before + out + detokenizer.flush() == expected(name, ids)


def encode_slowly(text: str) -> list[int]:
    """Byte tokens for whatever is no piece of one character."""
    ids = make("slow").get_vocab()
    pieces = [[c] if c in ids else [BYTE_TOKENS[b] for b in c.encode()] for c in ("▁" + text).replace(" ", "▁")]
    return [ids[piece] for pieces_of_one in pieces for piece in pieces_of_one]


def test_characters_of_byte_tokens_come_one_by_one():
    """A run of 27 byte tokens, of which the tokenizer says nothing for sure before its end."""
    ids = encode_slowly("ଓଡ଼ିଆ ଲିପି\n\n😀")
    for name in ("byte_fallback", "slow"):
        assert [delta for delta in stream(name, ids) if delta] == list("ଓଡ଼ିଆ ଲିପି\n\n😀")


def test_a_prompt_of_special_tokens_is_none_and_no_tokens_are_no_text():
    for name in NAMES:
        special, ids = make(name).all_special_ids, [make(name).convert_tokens_to_ids("o")] * 2
        assert "".join(stream(name, ids, special)) == "".join(stream(name, ids)) == decode(name, ids) != ""
        assert stream(name, [], special) == stream(name, [], ids) == [""]
        assert run(SamplingParams(), special[:1], name=name)[0] == Completion("", special[:1], "length")


def test_tokens_without_text_of_their_own_are_not_all_the_context():
    """Spaces are none where a decoder strips them at both ends, as those of transformers without Rust do."""

    class Stripping(SlowTokenizer):
        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            return "".join(tokens).replace("▁", " ").strip()

    tokenizer = Stripping(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    ids = encode_slowly("the" + " " * 40 + "fox")
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.add, ids)) == "the" + " " * 40 + "fox"


def test_decode_stream_would_not_do():
    """Why there is a detokenizer of our own; when one of these fails, it may have become simpler to use that one."""

    def out(name: str, ids: list[int], prompt: Sequence[int] = ()) -> str:
        decoder = decoders.DecodeStream(ids=prompt, skip_special_tokens=True)
        return "".join(decoder.step(make(name).backend_tokenizer, i) or "" for i in ids)

    ids = encode_slowly("a€b\ufffd")
    broken = [*encode_slowly("\n")[1:], ids[2], ids[5]]  # "\n", the first byte of "€", "b"
    cases = [([], ids, "a€b\ufffd"), (ids[:3], ids[3:], "€b\ufffd"), ([], broken, "\n\ufffdb")]
    for prompt, rest, text in cases:
        assert "".join(stream("byte_fallback", rest, prompt)) == text
    assert out("byte_fallback", ids) == "a€b"
    assert out("byte_fallback", ids[3:], ids[:3]) == "a€b"
    with pytest.raises(Exception, match="Invalid prefix"):
        out("byte_fallback", broken)


@pytest.mark.parametrize("name", NAMES)
def test_cost_per_token_does_not_grow(name):
    """The window, not the text, is decoded; counted in tokens handed to the tokenizer, not in seconds."""
    tokenizer, decoded = make(name), [0]

    class Counting:
        added_tokens_decoder = tokenizer.added_tokens_decoder
        convert_ids_to_tokens = staticmethod(tokenizer.convert_ids_to_tokens)
        convert_tokens_to_ids = staticmethod(tokenizer.convert_tokens_to_ids)

        @staticmethod
        def decode(token_ids, **kwargs):
            decoded[0] += len(token_ids)
            return tokenizer.decode(token_ids, **kwargs)

    ids = encode_slowly("the 日本 " * 200) if name == "slow" else tokenizer.encode("the quick 日本 jumps " * 200)
    first = tokenizer.convert_tokens_to_ids("ð" if name == "byte_level" else "<0xF0>")
    for tokens in (ids, [first] * 500, [tokenizer.eos_token_id] * 500):  # text; never a whole character; no text
        decoded[0] = 0
        detokenizer = Detokenizer(Counting(), tokens)
        for token_id in tokens:
            detokenizer.add(token_id)
        assert decoded[0] < 25 * len(tokens)


def reference_stop(text: str, shown: list[bool], stop: list[str], ignored: int) -> tuple[str, bool]:
    """What is shown before the stop string that is whole first, of those that end after `ignored` characters."""

    def show(length: int) -> str:
        return "".join(character for character, is_shown in zip(text[:length], shown, strict=False) if is_shown)

    for end in range(ignored + 1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return show(min(starts)), True
    return show(len(text)), False


@given(
    parts=st.lists(st.tuples(st.text("ab", max_size=4), st.integers(0, 3).map(bool)), max_size=12),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    uncounted=st.integers(0, 5).map(lambda n: max(0, n - 2)),
)
@example(parts=[("ab", True), ("b", True)], stop=["b", "aba"], uncounted=1)
def test_stop_strings_cut_the_text_wherever_it_is_split(parts, stop, uncounted):
    matcher, text, shown, out = StopStrings(stop), "", [], ""
    ignored = sum(len(part) for part, _ in parts[:uncounted])
    for i, (part, is_shown) in enumerate(parts):
        out += matcher.feed(part, shown=is_shown, counts=i >= uncounted)
        text, shown = text + part, shown + [is_shown] * len(part)
        if matcher.matched is not None:
            break
        ends = range(len(text) + 1)
        certain = next(n for n in ends if n == len(text) or any(s[:-1].startswith(text[n:]) for s in stop))
        assert out == reference_stop(text[:certain], shown, [], 0)[0]
    out += matcher.flush()
    assert (out, matcher.matched is not None) == reference_stop(text, shown, stop, ignored)


def run(
    params: SamplingParams, ids: list[int], finish: int = FinishCode.LENGTH, name: str = "byte_level"
) -> tuple[Completion, list[str]]:
    builder = CompletionBuilder(params, make(name))
    deltas = []
    for i, token in enumerate(ids):
        deltas.append(builder.add(token, finish if i == len(ids) - 1 else FinishCode.RUNNING))
        if builder.finish_reason:
            break
    return builder.completion(), deltas


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@settings(max_examples=100, deadline=None)
@given(
    text=TEXTS,
    stop=st.lists(st.sampled_from(["\n", "\n\n", "😀", "e", "the ", "</s>", "e</s>", "</s>\n", "é</s>日"]), max_size=3),
    minimum=st.integers(0, 9),
    seed=st.integers(0, 2**32),
)
def test_a_stop_string_ends_a_completion_at_the_token_that_makes_it_whole(name, text, stop, minimum, seed):
    """The text with special tokens written out is searched; `min_new_tokens` of them are not enough to stop at."""
    rng, end = random.Random(seed), make(name).eos_token_id
    pieces = [text, *rng.choices(["\n", "the ", "é", "e", "日", "😀"], k=6)]
    ids = [i for p in pieces for i in [*make(name).encode(p), *[end] * rng.randint(0, 1)]]
    minimum = min(minimum, len(ids))
    found, deltas = run(SamplingParams(max_new_tokens=200, stop=stop, min_new_tokens=minimum), ids, name=name)
    whole, shown, ignored, certain = "", [], 0, ""
    for count, token_id in enumerate(ids, 1):
        now = expected(name, ids[:count], final=count == len(ids))
        part = now[len(certain) :]
        hidden = make(name).decode([token_id]) if token_id in make(name).all_special_ids else ""
        whole, shown = whole + hidden, shown + [False] * len(hidden)
        whole, shown, certain = whole + part, shown + [True] * len(part), now
        if count < minimum:
            ignored = len(whole)
        text_so_far, matched = reference_stop(whole, shown, stop, ignored)
        if matched:
            break
    assert found == Completion(text_so_far, ids[:count], "stop" if matched else "length")
    assert "".join(deltas) == found.text


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


def test_what_ends_the_request_is_searched_and_not_shown():
    encode = make("byte_level").encode
    ids = [*encode("the dog"), make("byte_level").eos_token_id]
    for stop, text in (("dog</s>", "the "), ("</s>", "the dog"), ("dog", "the "), ("cat</s>", "the dog")):
        completion, deltas = run(SamplingParams(stop=stop), ids, FinishCode.STOP)
        assert completion.text == "".join(deltas) == text
        assert completion.finish_reason == "stop"
    ids = encode("the dog!")
    assert run(SamplingParams(stop="g!", stop_token_ids=ids[-1:]), ids, FinishCode.STOP)[0].text == "the do"
    # What a stop token leaves unfinished is not shown either; what it finds unfinished is.
    first = encode("😀")[0]
    assert run(SamplingParams(), [*encode("a"), first, first], FinishCode.STOP)[0].text == "a\ufffd"
    assert run(SamplingParams(), [first], FinishCode.STOP)[0].text == ""


def test_stop_string_counts_only_where_it_is_whole_from_min_new_tokens():
    ids = make("byte_level").encode("XXXX")
    for stop, text in (("X", "XX"), ("XX", "X"), ("XXX", "")):
        completion, _ = run(SamplingParams(stop=[stop], min_new_tokens=3), ids)
        assert completion == Completion(text, ids[:3], "stop")
    assert run(SamplingParams(stop=["XX", "X"], min_new_tokens=4), ids)[0] == Completion("XX", ids, "stop")


def test_text_is_never_tidied():
    """`clean_up_tokenization_spaces`, which transformers ignores for BPE, would take away what the model wrote."""
    for name in ("byte_level", "word_piece"):
        ids, tokenizer = make(name).encode("the dog ."), copy.copy(make(name))
        tokenizer.clean_up_tokenization_spaces = True
        detokenizer = Detokenizer(tokenizer)
        assert "".join(map(detokenizer.add, ids)) == decode(name, ids)


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
