import pytest
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, DistilBertConfig

from jdsi.errors import ConfigError
from jdsi.models.families import family_for
from parity import check_encoder, check_names

SMALL = dict(
    vocab_size=97,
    dim=60,
    n_heads=5,
    n_layers=2,
    hidden_dim=44,
    max_position_embeddings=32,
)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("auto_class", "change"),
    [
        (AutoModelForMaskedLM, {"sinusoidal_pos_embds": True}),
        (AutoModelForMaskedLM, {"tie_word_embeddings": False, "activation": "relu", "n_heads": 3}),
        (AutoModel, {"n_layers": 3}),
        (AutoModelForSequenceClassification, {"num_labels": 3}),
    ],
    ids=["masked-sinusoidal", "masked-untied", "bare", "classifier"],
)
def test_parity(auto_class: type, change: dict) -> None:
    check_encoder(DistilBertConfig(**(SMALL | change)), auto_class)


def test_published_names() -> None:
    names = ["vocab_projector.weight", "vocab_projector.bias", "vocab_layer_norm.bias", "vocab_transform.weight"]
    names += ["distilbert.transformer.layer.1.sa_layer_norm.bias", "distilbert.embeddings.LayerNorm.weight"]
    check_names(DistilBertConfig(**SMALL), names)


def test_unknown_architecture_is_an_error() -> None:
    config = DistilBertConfig(**SMALL, architectures=["DistilBertForQuestionAnswering"])
    with pytest.raises(ConfigError, match="DistilBertForQuestionAnswering' marks answers in a text"):
        family_for("distilbert").spec(config)
