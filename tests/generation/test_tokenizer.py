"""Which files of a folder make a tokenizer, and which ids end a sequence."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from jdsi.errors import CheckpointError
from jdsi.generation.tokenizer import load_eos_token_ids, load_tokenizer


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


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": 3}, (2,)),
        ({"eos_token_id": [2, 0]}, {"eos_token_id": 3}, (2, 0)),
        ({"eos_token_id": None}, {"eos_token_id": 3}, (3,)),
        ({"eos_token_id": []}, {"eos_token_id": 3}, (3,)),
        ({}, {"eos_token_id": [3]}, (3,)),
        (None, {"eos_token_id": 3}, (3,)),
        (None, {}, ()),
        (None, None, ()),
    ],
)
def test_end_of_sequence_ids(tmp_path, generation, config, ids):
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps(value))
    assert load_eos_token_ids(tmp_path) == ids


@pytest.mark.parametrize("value", [True, -1, "2", 2.0, [2, None], [[2]], [True], [2, -1], {"a": 2}, 2**31], ids=repr)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_end_of_sequence_ids_that_are_none(tmp_path, name, value):
    (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=rf"{name}: eos_token_id is .*; it must be null, a token id or a list"):
        load_eos_token_ids(tmp_path)


@pytest.mark.parametrize("text", [b"[]", b"{", b"\xff"])
def test_a_damaged_generation_config_is_named(tmp_path, text):
    (tmp_path / "generation_config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: "):
        load_eos_token_ids(tmp_path)
