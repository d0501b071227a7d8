"""Every family through the whole path: Hugging Face folder, engine, logits and tokens, Orbax and back."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import jdsi
from jdsi.converters import convert
from jdsi.converters.block_store import BlockStore
from jdsi.models.families import FAMILIES
from jdsi.runtime.offload import footprint_on
from jdsi.runtime.residency import plan_residency
from jdsi.runtime.streamed import StreamedExecutor
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
pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = [[5, 9, 2, 7], [11, 4, 4, 60, 33, 21, 8, 9, 10, 70, 71, 72], [3]]
# What the families call their number of layers.
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def three_layers(name: str, folder: Path, auto: Any = None) -> Path:
    """A random model of three layers, saved; a language model, if `auto` makes no other of its config."""
    settings = CONFIGS[name] | {key: 3 for key in _DEPTHS if key in CONFIGS[name]}
    if not any(key in settings for key in _DEPTHS):
        settings["num_hidden_layers"] = 3
    if name == "gpt_neo":
        settings["attention_types"] = [[["global", "local", "global"], 1]]
    if auto is None:
        auto = transformers.AutoModelForMaskedLM if name in ENCODERS else transformers.AutoModelForCausalLM
    random_torch_model(transformers.AutoConfig.for_model(name, **settings), auto).save_pretrained(folder)
    return folder


def test_every_family_is_here() -> None:
    assert CONFIGS.keys() == FAMILIES.keys()


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_whole_path(name: str, tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(name, **CONFIGS[name])
    auto = transformers.AutoModelForMaskedLM if name in ENCODERS else transformers.AutoModelForCausalLM
    model = random_torch_model(config, auto)
    original, orbax, back = tmp_path / "hf", tmp_path / "orbax", tmp_path / "back"
    model.save_pretrained(original)

    engine = jdsi.init_inference(original, dtype="float32")
    logits = engine.forward(PROMPTS)
    with torch.no_grad():
        for row, ours in zip(PROMPTS, logits, strict=True):
            expected = model(torch.tensor([row])).logits[0].numpy()
            np.testing.assert_allclose(ours[: len(row)], expected, rtol=5e-4, atol=5e-5)
        if name in ENCODERS:
            with pytest.raises(jdsi.ConfigError, match="encoder"):
                engine.generate(PROMPTS)
        else:
            completions = engine.generate(PROMPTS, jdsi.SamplingParams(max_new_tokens=8))
            for row, completion in zip(PROMPTS, completions, strict=True):
                out = model.generate(torch.tensor([row]), max_new_tokens=8, do_sample=False, pad_token_id=0)
                assert completion.token_ids == out[0, len(row) :].tolist()

    store = BlockStore.open(original)
    residency = plan_residency(footprint_on(store, np.dtype("float32")), None)
    streamed = StreamedExecutor(store, residency, dtype="float32")
    with contextlib.closing(jdsi.InferenceEngine(streamed, jdsi.InferenceConfig(dtype="float32"))) as offloaded:
        np.testing.assert_allclose(offloaded.forward(PROMPTS), logits, rtol=1e-4, atol=1e-5)
        if name not in ENCODERS:
            again = offloaded.generate(PROMPTS, jdsi.SamplingParams(max_new_tokens=8, ignore_eos=True))
            plain = engine.generate(PROMPTS, jdsi.SamplingParams(max_new_tokens=8, ignore_eos=True))
            assert [c.token_ids for c in again] == [c.token_ids for c in plain]

    convert(original, orbax, to="orbax")
    np.testing.assert_array_equal(jdsi.init_inference(orbax, dtype="float32").forward(PROMPTS), logits)
    convert(orbax, back, to="hf")
    before, after = load_file(original / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() >= after.keys()
    for key, value in after.items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)
    reloaded, info = auto.from_pretrained(back, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        row = torch.tensor([PROMPTS[1]])
        torch.testing.assert_close(reloaded(row).logits, model(row).logits)


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_bare_backbone_gives_hidden_states(name: str, tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(name, **CONFIGS[name])
    model = random_torch_model(config, transformers.AutoModel)
    model.save_pretrained(tmp_path)
    engine = jdsi.init_inference(tmp_path, dtype="float32")
    hidden = engine.forward(PROMPTS)
    with torch.no_grad():
        for row, ours in zip(PROMPTS, hidden, strict=True):
            expected = model(torch.tensor([row])).last_hidden_state[0].numpy()
            np.testing.assert_allclose(ours[: len(row)], expected, rtol=5e-4, atol=5e-5)
    with pytest.raises(jdsi.ConfigError, match="cannot generate"):
        engine.generate(PROMPTS)
