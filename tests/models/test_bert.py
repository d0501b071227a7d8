from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    BertConfig,
)

from jdsi.converters import load_model
from jdsi.errors import ConfigError
from jdsi.models import Transformer, parameters
from jdsi.models.families import family_for
from parity import check_causal, check_encoder, check_names, random_torch_model

SMALL = dict(
    vocab_size=97,
    hidden_size=60,
    num_attention_heads=5,
    num_hidden_layers=2,
    intermediate_size=44,
    max_position_embeddings=32,
    type_vocab_size=3,
)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("auto_class", "change"),
    [
        (AutoModelForMaskedLM, {}),
        (AutoModelForMaskedLM, {"tie_word_embeddings": False, "hidden_act": "relu", "layer_norm_eps": 0.1}),
        (AutoModelForPreTraining, {"num_attention_heads": 3, "type_vocab_size": 1}),
        (AutoModel, {"num_hidden_layers": 3}),
        (AutoModelForSequenceClassification, {"num_labels": 5}),
    ],
    ids=["masked", "masked-untied", "pre-training", "bare", "classifier"],
)
def test_parity(auto_class: type, change: dict) -> None:
    check_encoder(BertConfig(**(SMALL | change)), auto_class)


@pytest.mark.parity
def test_decoder_parity() -> None:
    check_causal(BertConfig(**SMALL, is_decoder=True, bos_token_id=None))


def test_published_names() -> None:
    # As in bert-base-uncased, whose norms have the names of TensorFlow.
    names = ["bert.embeddings.LayerNorm.gamma", "bert.encoder.layer.1.attention.output.LayerNorm.beta"]
    names += ["bert.embeddings.position_ids"]
    names += ["cls.predictions.bias", "cls.predictions.transform.LayerNorm.gamma", "cls.predictions.decoder.weight"]
    names += ["cls.predictions.decoder.bias"]
    check_names(BertConfig(**SMALL, architectures=["BertForMaskedLM"]), names)
    names += ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    names += ["cls.seq_relationship.weight", "cls.seq_relationship.bias"]
    check_names(BertConfig(**SMALL, architectures=["BertForPreTraining"]), names)
    bare = BertConfig(**SMALL, architectures=["BertModel"])
    names = ["embeddings.token_type_embeddings.weight", "encoder.layer.0.output.dense.bias", "pooler.dense.weight"]
    check_names(bare, names, bare=True)


def test_loads_the_old_names_of_norms(tmp_path: Path) -> None:
    model = random_torch_model(BertConfig(**SMALL), AutoModelForPreTraining)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    renamed = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in state.items()
    }
    save_file(renamed, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path, dtype="float32")
    expected = model.bert.embeddings.LayerNorm.bias.detach().numpy()
    np.testing.assert_array_equal(parameters(loaded)["embedding.norm.bias"], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_decoder": True, "add_cross_attention": True}, "add_cross_attention"),
        ({"architectures": ["BertLMHeadModel"]}, "is_decoder"),
        (
            {"architectures": ["BertForTokenClassification"]},
            "'BertForTokenClassification' labels every token, which is not supported; .*BertForMaskedLM.*BertModel",
        ),
        (
            {"architectures": ["BertForMaskdLM"]},
            "unknown architecture 'BertForMaskdLM' .*did you mean 'BertForMaskedLM'",
        ),
        ({"architectures": ["BertForSequenceClassification"], "num_labels": 0}, "id2label names no label"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
    ],
)
def test_what_it_cannot_honour(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        family_for("bert").spec(BertConfig(**(SMALL | change)))


def test_a_head_that_is_not_there() -> None:
    tokens = jnp.ones((1, 3), jnp.int32)

    def model(architecture: str) -> Transformer:
        return Transformer(family_for("bert").spec(BertConfig(**SMALL, architectures=[architecture])))

    masked, classifier, bare = map(model, ("BertForMaskedLM", "BertForSequenceClassification", "BertModel"))
    with pytest.raises(ValueError, match="not a sequence classifier; call it for logits"):
        masked.classify(tokens)
    with pytest.raises(ValueError, match=r"not a sequence classifier; use pool\(\)"):
        bare.classify(tokens)
    with pytest.raises(ValueError, match=r"no encoder with a pooler; use classify\(\)"):
        classifier.pool(tokens)
    with pytest.raises(ValueError, match="no language-model head"):
        classifier.logits(jnp.zeros((3, 60)))
