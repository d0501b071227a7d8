"""Heads that say something of whole sequences: which classes have them, and those of decoders against transformers."""

import dataclasses

import pytest
import transformers
from transformers import AutoConfig

from jdsi.errors import ConfigError
from jdsi.models import TransformerSpec
from jdsi.models.families import family_for
from jdsi.models.families.architecture import exported_config, with_stored_heads
from parity import check_decoder_classifier
from zoo import CONFIGS, ENCODERS

# What stores and computes its layers differently.
TELLING = ("llama", "gpt2", "opt", "falcon")


def config(name: str, architecture: str | None = None, **changes: object) -> transformers.PretrainedConfig:
    architectures = None if architecture is None else [architecture]
    return AutoConfig.for_model(name, **(CONFIGS[name] | {"architectures": architectures} | changes))


def spec(name: str, architecture: str | None = None, **changes: object) -> TransformerSpec:
    return family_for(name).spec(config(name, architecture, **changes))


@pytest.mark.parity
@pytest.mark.parametrize(
    "name", [n if n in TELLING else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS if n not in ENCODERS]
)
def test_decoders_read_the_last_token(name: str) -> None:
    padding = {"pad_token_id": None} if name == "gpt2" else {}
    check_decoder_classifier(config(name, num_labels=1 if name == "llama" else 3, **padding))


def test_every_decoder_has_a_classifier() -> None:
    for name in CONFIGS.keys() - ENCODERS:
        found = spec(name, f"{type(config(name)).__name__.removesuffix('Config')}ForSequenceClassification")
        assert found.head is None
        assert found.classifier is not None
        assert (found.classifier.labels, found.classifier.token) == (("LABEL_0", "LABEL_1"), "last")
        assert "score.weight" in [s.name for e in family_for(name).weight_map(found).entries for s in e.sources]


def test_labels_and_what_their_scores_are() -> None:
    name = "BertForSequenceClassification"
    found = spec("bert", name, id2label={0: "no", 1: "yes", 2: "maybe"}).classifier
    assert found is not None
    assert (found.labels, found.scores) == (("no", "yes", "maybe"), "softmax")
    for changes, scores in (
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "sigmoid"),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, "sigmoid"),
        ({"num_labels": 3, "problem_type": "regression"}, "identity"),
        ({"num_labels": 1}, "identity"),
        ({"num_labels": 2, "problem_type": "single_label_classification"}, "softmax"),
    ):
        found = spec("bert", name, **changes).classifier
        assert found is not None
        assert found.scores == scores, changes


@pytest.mark.parametrize(
    ("name", "architecture", "message"),
    [
        ("llama", "LlamaForTokenClassification", "labels every token, which is not supported; supported: LlamaForCau"),
        ("gpt2", "GPT2DoubleHeadsModel", "chooses between texts beside its language model, which is not supported"),
        ("gpt2", "GPT2ForQuestionAnswering", "supported: .*GPT2LMHeadModel, GPT2ForSequenceClassification, GPT2Model"),
        ("bert", "BertForNextSentencePrediction", "says whether a text follows another"),
        ("llama", "LlamaForSequenceClasification", "did you mean 'LlamaForSequenceClassification'"),
    ],
)
def test_other_heads_are_refused_by_name(name: str, architecture: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec(name, architecture)


def test_a_projected_opt_needs_its_language_model_head() -> None:
    for architecture in ("OPTModel", "OPTForSequenceClassification"):
        with pytest.raises(ConfigError, match=f"word_embed_proj_dim 16 .* in an {architecture}"):
            spec("opt", architecture, word_embed_proj_dim=16)


def test_heads_that_a_checkpoint_may_lack() -> None:
    pooler = {"classifier.dense.weight", "classifier.dense.bias"}
    whole = pooler | {"classifier.out.weight", "classifier.out.bias"}
    for architecture, stored, stays in (
        ("BertModel", pooler, True),
        ("BertModel", set(), False),
        ("BertForPreTraining", whole, True),
        ("BertForPreTraining", pooler, False),
        ("BertForPreTraining", set(), False),
        ("BertForSequenceClassification", set(), True),  # to be missed by name
        ("BertForMaskedLM", whole, False),
    ):
        own = spec("bert", architecture)
        found = with_stored_heads(own, stored.__contains__)
        assert (found.classifier is not None) == stays, (architecture, stored)
        assert dataclasses.replace(found, classifier=own.classifier) == own


def test_the_class_that_is_written_is_that_of_the_weights() -> None:
    def written(own: TransformerSpec, architecture: str) -> str:
        return exported_config({"architectures": [architecture], "x": 1}, own)["architectures"][0]

    pre_training, bare = spec("bert", "BertForPreTraining"), spec("bert", "BertModel")
    classifier = spec("bert", "BertForSequenceClassification")
    no_classifier = dataclasses.replace(pre_training, classifier=None)
    for own, name, expected in (
        (pre_training, "BertForPreTraining", "BertForPreTraining"),
        (no_classifier, "BertForPreTraining", "BertForMaskedLM"),
        (no_classifier, "BertForMaskedLM", "BertForMaskedLM"),
        (bare, "BertModel", "BertModel"),
        (dataclasses.replace(bare, classifier=None), "BertModel", "BertModel"),
        (bare, "BertForPreTraining", "BertModel"),
        (classifier, "BertForSequenceClassification", "BertForSequenceClassification"),
        (spec("gpt2", "GPT2Model"), "GPT2LMHeadModel", "GPT2Model"),
        (spec("llama"), "RWForCausalLM", "RWForCausalLM"),
    ):
        assert written(own, name) == expected, name
    assert exported_config({"x": 1}, bare) == {"x": 1}
    for own, name, message in (
        (spec("bert"), "BertModel", "says 'BertModel', and the model to write has a language-model head"),
        (classifier, "BertForMaskedLM", "the model to write has a classifier"),
        (classifier, "BertForPreTraining", "the model to write has a classifier"),
        (pre_training, "BertForMaskedLM", "has a language-model head and a classifier"),
    ):
        with pytest.raises(ConfigError, match=message):
            exported_config({"architectures": [name]}, own)
