"""Every family through the whole path: Hugging Face folder, engine, logits and tokens, Orbax and back."""

import contextlib
from pathlib import Path

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
from zoo import CONFIGS, ENCODERS, PROMPTS

# Streamed as well as in memory: layers of several kinds, halves side by side, positions of every sort. The others'
# layers are streamed for their logits alone.
GENERATED = ("llama", "gemma2", "gpt2", "gpt_neo", "gptj", "bloom")

pytestmark = pytest.mark.usefixtures("quick_compilation")


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
        if name in GENERATED:
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
