import pytest
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    RobertaConfig,
)

from jdsi.errors import ConfigError
from jdsi.models.families import family_for
from parity import check_encoder, check_names

SMALL = dict(
    vocab_size=97,
    hidden_size=60,
    num_attention_heads=5,
    num_hidden_layers=2,
    intermediate_size=44,
    max_position_embeddings=34,
    type_vocab_size=1,
)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("auto_class", "change"),
    [
        (AutoModelForMaskedLM, {"hidden_act": "relu"}),
        (AutoModelForMaskedLM, {"tie_word_embeddings": False, "pad_token_id": 0, "type_vocab_size": 2}),
        (AutoModel, {"num_attention_heads": 3, "pad_token_id": 2}),
        (AutoModelForSequenceClassification, {"num_labels": 1}),
    ],
    ids=["masked", "masked-untied", "bare", "classifier"],
)
def test_parity(auto_class: type, change: dict) -> None:
    check_encoder(RobertaConfig(**(SMALL | change)), auto_class)


@pytest.mark.parity
def test_decoder_parity() -> None:
    # Not against generate() of transformers, which counts positions from 0 and so disagrees with its own forward pass.
    check_encoder(RobertaConfig(**SMALL, is_decoder=True), AutoModelForCausalLM)


def test_positions_start_behind_the_padding_id() -> None:
    spec = family_for("roberta").spec(RobertaConfig(**SMALL))
    assert spec.embedding.positions is not None
    assert (spec.embedding.positions.offset, spec.max_positions) == (2, 32)


def test_published_names() -> None:
    names = ["roberta.embeddings.position_ids", "lm_head.decoder.weight"]
    names += ["lm_head.bias", "lm_head.decoder.bias", "lm_head.layer_norm.weight", "lm_head.dense.bias"]
    check_names(RobertaConfig(**SMALL), names)
    check_names(RobertaConfig(**SMALL, architectures=["RobertaModel"]), ["roberta.pooler.dense.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pad_token_id": None}, "pad_token_id"),
        ({"architectures": ["RobertaForCausalLM"]}, "is_decoder"),
        ({"architectures": ["RobertaForMultipleChoice"]}, "RobertaForMultipleChoice' chooses between texts"),
    ],
)
def test_what_it_cannot_honour(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        family_for("roberta").spec(RobertaConfig(**(SMALL | change)))
