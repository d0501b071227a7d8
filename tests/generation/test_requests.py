"""What is said of requests before any work is done."""

import warnings
from pathlib import Path
from typing import Any

import torch

import zoo
from jdsi import JdsiWarning, SamplingParams
from jdsi.converters import load_spec
from jdsi.generation.defaults import GenerationDefaults
from jdsi.generation.requests import Intake

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


def test_growing_past_a_change_of_long_rope_is_told_once(tmp_path: Path) -> None:
    model: Any = zoo.save("phi3", tmp_path, rope_parameters=LONGROPE, original_max_position_embeddings=12)
    assert load_spec(tmp_path).recomputed_beyond == 12

    def computed_anew(prompt: list[int], new_tokens: int) -> bool:
        """Whether transformers ran more than one token at a time after the prompt."""
        seen: list[int] = []
        hook = model.model.register_forward_pre_hook(
            lambda _, args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
        )
        with torch.no_grad():
            model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
        hook.remove()
        return any(count > 1 for count in seen[1:])

    for length, new_tokens in ((5, 8), (5, 9), (12, 1), (12, 2), (13, 4)):
        prompt = [1] * length
        intake = Intake(load_spec(tmp_path), None, 64, 8, GenerationDefaults())
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", JdsiWarning)
            for _ in range(2):
                intake.requests([prompt, prompt], SamplingParams(max_new_tokens=new_tokens))
        assert len(told) == computed_anew(prompt, new_tokens), (length, new_tokens)
        assert all("may grow beyond 12 tokens" in str(one.message) for one in told)
