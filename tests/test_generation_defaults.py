"""An engine does what the `generation_config.json` of its model's folder asks for, as transformers does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import jdsi
from jdsi import SamplingParams

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = [[5, 9, 2, 7, 7, 1], [40, 8]]


def asking(folder: Path, **options: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0, **options}))
    return folder


GREEDY = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_length": 12, "max_length": 24, "temperature": 0.3}
BEAMS = {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True, "max_new_tokens": 9, "repetition_penalty": 1.2}


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_equals_transformers_on_the_same_folder(folder: Path, options: dict[str, Any]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(asking(folder, **options)).eval()
    engine = jdsi.init_inference(folder)
    assert engine.generation_defaults.values.items() >= {"repetition_penalty": options["repetition_penalty"]}.items()
    for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS), strict=True):
        with torch.no_grad():
            expected = model.generate(torch.tensor([prompt]))[0, len(prompt) :].tolist()
        assert completion.token_ids == expected
    if "num_beams" in options:
        with pytest.raises(jdsi.ConfigError, match=r"use generate, or num_beams=1"):
            engine.stream(PROMPTS)
    neutral = SamplingParams(repetition_penalty=1, no_repeat_ngram=0, min_new_tokens=0, max_new_tokens=8, num_beams=1)
    plain = jdsi.init_inference(folder, generation_config="ignore")
    assert plain.eos_token_ids == (0,)
    assert engine.generate(PROMPTS, neutral) == plain.generate(PROMPTS, SamplingParams(max_new_tokens=8))


def test_a_folder_that_samples(folder: Path) -> None:
    engine = jdsi.init_inference(asking(folder, do_sample=True, temperature=0.9, top_p=0.8, max_new_tokens=8))
    plain = jdsi.init_inference(folder, generation_config="ignore")
    asked = SamplingParams(temperature=0.9, top_p=0.8, top_k=50, max_new_tokens=8, seed=4)
    sampled = engine.generate(PROMPTS, SamplingParams(seed=4))
    assert sampled == plain.generate(PROMPTS, asked)
    assert sampled != plain.generate(PROMPTS, SamplingParams(max_new_tokens=8))
    greedy = plain.generate(PROMPTS, SamplingParams(max_new_tokens=8))
    assert engine.generate(PROMPTS, SamplingParams(temperature=0)) == greedy
    with pytest.warns(jdsi.JdsiWarning, match="does not sample here"):
        beams = engine.generate(PROMPTS, SamplingParams(num_beams=2))
    assert beams == plain.generate(PROMPTS, SamplingParams(num_beams=2, max_new_tokens=8))


def test_what_does_not_fit_is_named(folder: Path) -> None:
    with pytest.warns(jdsi.JdsiWarning, match=r"generation_config\.json asks for penalty_alpha, which"):
        engine = jdsi.init_inference(asking(folder, max_length=6, penalty_alpha=0.6))
    with pytest.raises(jdsi.CapacityError, match=r"^prompt 0 has 6 tokens, and max_length of .* is 6"):
        engine.generate(PROMPTS)
    assert len(engine.generate(PROMPTS[1], SamplingParams(ignore_eos=True))[0].token_ids) == 4
    engine = jdsi.init_inference(asking(folder, stop_strings=["x"]))
    engine.tokenizer = None
    with pytest.raises(jdsi.ConfigError, match=r"generation_config\.json asks for stop=\('x',\); give a tokenizer, or"):
        engine.generate(PROMPTS)
    with pytest.raises(jdsi.ConfigError, match=r"generation_config='ingore' \(did you mean 'ignore'\?\)"):
        jdsi.init_inference(folder, generation_config="ingore")
