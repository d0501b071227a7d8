"""Words as token ids."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jdsi.generation.words import ways_to_write

TEXT = ["the quick brown fox", "a fox, (fox) foxes", "quickly the brownie", "unfoxed"] * 8


def byte_level() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def metaspace() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_a_word_is_found_in_the_tokens_of_texts_that_have_it(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    for word in ("fox", "quick", "brown", "zebra"):
        ways = ways_to_write(word, tokenizer)
        assert len(ways) == 2
        assert ways == ways_to_write(f" {word}", tokenizer)
        assert sorted(tokenizer.decode(way).strip() for way in ways) == [word, word]
        for text in (f"the {word}", f"the\n{word}", f"a~{word} of"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            places = [tuple(ids[i : i + len(way)]) == way for way in ways for i in range(len(ids))]
            assert any(places), (text, ways, ids)
