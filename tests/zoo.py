"""A tiny random model of every family, in Hugging Face format."""

from pathlib import Path
from typing import Any

import torch
import transformers

from parity import random_torch_model

_DECODER = {"vocab_size": 89, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
_LLAMA = _DECODER | {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 48,
    "head_dim": 8,
}
_GPT = _DECODER | {"n_embd": 40, "n_head": 5, "n_layer": 2, "n_positions": 48}
_NEO = _DECODER | {"hidden_size": 40, "num_attention_heads": 5, "max_position_embeddings": 48}
_ENCODER = {"vocab_size": 89, "max_position_embeddings": 48, "pad_token_id": 1}
_BERT = _ENCODER | {
    "hidden_size": 40,
    "num_attention_heads": 5,
    "num_hidden_layers": 2,
    "intermediate_size": 56,
}
CONFIGS = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 7},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA | {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi3": _LLAMA | {"original_max_position_embeddings": 48},
    "gpt2": _GPT,
    "gpt_neo": _NEO
    | {"num_layers": 2, "num_heads": 5, "attention_types": [[["global", "local"], 1]], "window_size": 5},
    "gptj": _GPT | {"rotary_dim": 4},
    "gpt_neox": _NEO | {"intermediate_size": 56, "rotary_pct": 0.5},
    "opt": _NEO | {"ffn_dim": 56, "word_embed_proj_dim": 40},
    "bloom": _DECODER | {"hidden_size": 40, "n_head": 5, "n_layer": 2},
    "falcon": _NEO | {"new_decoder_architecture": False, "multi_query": True},
    "bert": _BERT,
    "roberta": _BERT | {"max_position_embeddings": 50},
    "distilbert": _ENCODER | {"dim": 40, "n_heads": 5, "n_layers": 2, "hidden_dim": 56},
}
ENCODERS = {"bert", "roberta", "distilbert"}


def auto_class(name: str) -> Any:
    """The class of a family's language models."""
    return transformers.AutoModelForMaskedLM if name in ENCODERS else transformers.AutoModelForCausalLM


PROMPTS = [[5, 9, 2, 7], [11, 4, 4, 60, 33, 21, 8, 9, 10, 70, 71, 72], [3]]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "##x", "good", "bad", "film", "."]


def save_as(auto: Any, name: str, folder: Path, **changes: Any) -> torch.nn.Module:
    """Saves a family's model of another class than language models are; a BERT with a tokenizer of `WORDS`."""
    model = random_torch_model(transformers.AutoConfig.for_model(name, **(CONFIGS[name] | changes)), auto)
    model.save_pretrained(folder)
    if name == "bert":
        transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return model


def save(name: str, folder: Path, **changes: Any) -> torch.nn.Module:
    """Saves a family's model, with changes to its settings, and returns it."""
    model = random_torch_model(transformers.AutoConfig.for_model(name, **(CONFIGS[name] | changes)), auto_class(name))
    model.save_pretrained(folder)
    return model


# What the families call their number of layers.
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def three_layers(name: str, folder: Path, auto: Any = None) -> Path:
    """A random model of three layers, saved."""
    settings = CONFIGS[name] | {key: 3 for key in _DEPTHS if key in CONFIGS[name]}
    if not any(key in settings for key in _DEPTHS):
        settings["num_hidden_layers"] = 3
    if name == "gpt_neo":
        settings["attention_types"] = [[["global", "local", "global"], 1]]
    auto = auto or auto_class(name)
    random_torch_model(transformers.AutoConfig.for_model(name, **settings), auto).save_pretrained(folder)
    return folder
