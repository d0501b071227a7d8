"""Every family gives the same logits and tokens however it is spread over devices."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jdsi
from zoo import CONFIGS, ENCODERS, PROMPTS, three_layers

# A few tokens each, from many programs.
pytestmark = pytest.mark.usefixtures("quick_compilation")

# Heads (5), hidden units (56 or 160) and vocabulary (89) come out even for hardly any of these. The first and the last
# of three stages have all that is a family's own; one between them is in THOROUGHLY.
STAGES = {"tensor_parallel": 2, "pipeline_parallel": 2}
SEQUENCE = {"tensor_parallel": 4, "sequence_parallel": True}
# In `make test` every family is on one of these, and every kind of layer on both: norms before and behind, halves one
# after the other and side by side, q, k and v together and apart, positions learned, rotated and in the bias.
ALWAYS = {
    "mistral": STAGES,
    "qwen2": SEQUENCE,
    "qwen3": STAGES,
    "gemma2": SEQUENCE,
    "phi3": STAGES,
    "gpt2": STAGES,
    "gpt_neo": SEQUENCE,
    "gptj": SEQUENCE,
    "gpt_neox": STAGES,
    "opt": SEQUENCE,
    "bloom": STAGES,
    "falcon": SEQUENCE,
    "bert": STAGES,
    "roberta": SEQUENCE,
    "distilbert": STAGES,
}
THOROUGHLY = (
    {"tensor_parallel": 1, "data_parallel": 2},
    {"tensor_parallel": 4},
    {"tensor_parallel": 8},
    {"pipeline_parallel": 2, "prompt_pieces": 2},
    {"tensor_parallel": 2, "pipeline_parallel": 2, "data_parallel": 2},
    {"tensor_parallel": 2, "pipeline_parallel": 3, "sequence_parallel": True},
)
GREEDY = jdsi.SamplingParams(max_new_tokens=8, ignore_eos=True)


def _name(degrees: dict) -> str:
    return " ".join(f"{key.partition('_')[0]}{value}" for key, value in degrees.items())


def _check(name: str, folder: Path, meshes: Sequence[dict]) -> None:
    """Logits and greedy tokens on each mesh are those of one device."""

    def run(**degrees: Any) -> tuple[np.ndarray, list[list[int]]]:
        engine = jdsi.init_inference(folder, dtype="float32", **degrees)
        logits = np.asarray(engine.forward(PROMPTS))
        if name in ENCODERS:
            return logits, []
        return logits, [c.token_ids for c in engine.generate(PROMPTS, GREEDY)]

    expected, tokens = run()
    for degrees in meshes:
        actual, generated = run(**degrees)
        for row, prompt in enumerate(PROMPTS):
            n = len(prompt)
            np.testing.assert_allclose(
                actual[row, :n], expected[row, :n], rtol=5e-4, atol=5e-5, err_msg=f"{_name(degrees)}, row {row}"
            )
        assert generated == tokens, _name(degrees)


def test_every_family_is_here() -> None:
    assert {*ALWAYS, "llama"} == CONFIGS.keys()


@pytest.mark.parametrize("name", ALWAYS)
def test_families_do_not_depend_on_the_mesh(name: str, tmp_path: Path) -> None:
    _check(name, three_layers(name, tmp_path / name), [ALWAYS[name]])


def test_many_meshes(tmp_path: Path) -> None:
    _check("llama", three_layers("llama", tmp_path), [STAGES, SEQUENCE, *THOROUGHLY])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_on_every_mesh(name: str, tmp_path: Path) -> None:
    _check(name, three_layers(name, tmp_path / name), [STAGES, SEQUENCE, *THOROUGHLY])
