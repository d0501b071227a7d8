"""Which files of a folder make a tokenizer."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from jdsi.errors import CheckpointError
from jdsi.generation.tokenizer import load_tokenizer


def test_a_folder_without_tokenizer(tmp_path):
    for name in ("config.json", "generation_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"no tokenizer: none of tokenizer\.json, .*spiece\.model"):
        load_tokenizer(tmp_path, required=True)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "tokenizer.json"),
        ("llama", "tokenizer.model"),
        ("t5", "spiece.model"),
        ("xlm-roberta", "sentencepiece.bpe.model"),
    ],
)
def test_a_damaged_tokenizer_is_an_error_and_not_an_absent_one(tmp_path, family, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    (tmp_path / name).write_bytes(b"\0damaged")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", '"x"'])
def test_a_damaged_tokenizer_config_is_named(tmp_path, text):
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).convert_tokens_to_ids("a") == 0
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: "):
        load_tokenizer(tmp_path)


def test_a_tokenizer_config_that_transformers_cannot_use(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": 5}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_what_it_needs(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read: its files have no 'added_tokens'"):
        load_tokenizer(tmp_path)
