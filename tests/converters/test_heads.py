"""Every head of every class goes through every layout and back, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import jdsi
from jdsi.converters import convert, export_huggingface, load_model, load_spec
from jdsi.models import Transformer, parameters
from parity import random_torch_model

_SMALL = {"vocab_size": 13, "max_position_embeddings": 16, "pad_token_id": 1, "num_labels": 3}
_BERT = _SMALL | {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 12}
_CONFIGS = {
    "Bert": transformers.BertConfig(**_BERT),
    "Roberta": transformers.RobertaConfig(**_BERT),
    "DistilBert": transformers.DistilBertConfig(**_SMALL, dim=8, n_heads=2, n_layers=1, hidden_dim=12),
    "Llama": transformers.LlamaConfig(**_BERT),
}
CLASSES = (
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertLMHeadModel",
    "BertForSequenceClassification",
    "BertModel",
    "RobertaForMaskedLM",
    "RobertaForCausalLM",
    "RobertaForSequenceClassification",
    "RobertaModel",
    "DistilBertForMaskedLM",
    "DistilBertForSequenceClassification",
    "DistilBertModel",
    "LlamaForSequenceClassification",
)


def random_model(name: str, **changes: Any) -> Any:
    """Of the class `name`, every parameter random."""
    config = next(config for family, config in _CONFIGS.items() if name.startswith(family))
    config = type(config)(**config.to_dict() | changes)
    if name in ("BertLMHeadModel", "RobertaForCausalLM"):
        config.is_decoder = True
    return random_torch_model(config, getattr(transformers, name))


def check_same(folder: Path, model: Any) -> None:
    """A folder holds the weights of `model`, all of them and no other, and names its class."""
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], folder
    assert not info["unexpected_keys"], folder
    assert again.config.architectures == [type(model).__name__]
    state = again.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), (folder, key)


@pytest.mark.parity
def test_every_class_comes_back_from_every_layout(tmp_path: Path) -> None:
    for name in CLASSES:
        model, folder = random_model(name), tmp_path / name
        model.save_pretrained(folder / "original")
        for layout in ("orbax", "streaming", "sharded", "hf"):
            options = {"tensor_parallel": 2} if layout == "sharded" else {}
            convert(folder / "original", folder / layout, to=layout, **options)
            back = folder / layout
            if layout != "hf":
                back = folder / f"from {layout}"
                convert(folder / layout, back, to="hf")
            check_same(back, model)


def test_an_untied_head_leaves_no_parameter_of_its_class_out(tmp_path: Path) -> None:
    names = {
        "BertForMaskedLM": ("cls.predictions.bias", "cls.predictions.decoder.bias"),
        "RobertaForMaskedLM": ("lm_head.bias", "lm_head.decoder.bias"),
    }
    for name, (idle, used) in names.items():
        model = random_model(name, tie_word_embeddings=False)
        model.save_pretrained(tmp_path / name)
        convert(tmp_path / name, tmp_path / f"{name} back", to="hf")
        again, info = type(model).from_pretrained(tmp_path / f"{name} back", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        state = again.state_dict()
        for key, value in model.state_dict().items():
            assert torch.equal(state[key], state[used] if key == idle else value), (name, key)


@pytest.mark.parity
def test_an_engine_saves_its_heads(tmp_path: Path) -> None:
    for name in ("BertForPreTraining", "RobertaModel", "LlamaForSequenceClassification"):
        model, folder = random_model(name), tmp_path / name
        model.save_pretrained(folder / "original")
        for degrees in ({}, {"tensor_parallel": 2}):
            engine = jdsi.init_inference(folder / "original", dtype="float32", **degrees)
            engine.save(folder / str(degrees), to="hf")
            check_same(folder / str(degrees), model)


def test_what_is_left_out_is_left_out_of_the_class_too(tmp_path: Path) -> None:
    random_model("BertForPreTraining").save_pretrained(tmp_path / "original")
    model = load_model(tmp_path / "original", dtype="float32")
    kept = {name: array for name, array in parameters(model).items() if not name.startswith("classifier.")}
    spec = load_spec(tmp_path / "original")
    masked = Transformer.from_parameters(type(spec)(**{**vars(spec), "classifier": None}), kept)
    export_huggingface(masked, tmp_path / "original", tmp_path / "back")
    again, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(again).__name__ == "BertForMaskedLM"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert load_spec(tmp_path / "back") == masked.spec
