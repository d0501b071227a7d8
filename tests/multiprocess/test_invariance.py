"""Several processes give the answers of one device, and notice when they are told different things."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

import jdsi
from peer_processes import Run, pickled_model
from peer_worker import PROMPTS, answers, model_at
from zoo import CONFIGS, ENCODERS, three_layers

pytestmark = pytest.mark.usefixtures("quick_compilation")  # as in the other processes, see peer_processes

BOTH = {"tensor_parallel": 2, "pipeline_parallel": 2}
EVERY = (
    {"tensor_parallel": 2},
    {"tensor_parallel": 8},
    {"tensor_parallel": 4, "sequence_parallel": True},
    {"pipeline_parallel": 2},
    {"tensor_parallel": 2, "pipeline_parallel": 3},
    {"data_parallel": 2},
    BOTH | {"data_parallel": 2},
)


def _check(
    folder: Path,
    count: int,
    devices: int,
    runs: list[tuple[str, dict[str, Any], tuple[str, ...]]],
    within: float = 240,
) -> None:
    """`runs` are family, degrees and samplings; all are made by one start of the processes, in so many seconds."""
    create = _saved if count == 2 else pickled_model  # to read a checkpoint is slower, so it is enough to do it once
    models = {name: create(name, folder / name) for name in {name for name, _, _ in runs}}
    plan = [
        {"name": f"{name} {degrees}", "model": str(models[name]), "degrees": degrees, "samplings": samplings}
        for name, degrees, samplings in runs
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    with Run("invariance", folder, count, devices) as processes:
        wanted = {name: sorted({s for n, _, samplings in runs if n == name for s in samplings}) for name in models}
        alone = {
            name: answers(jdsi.init_inference(model_at(path), dtype="float32"), wanted[name])
            for name, path in models.items()
        }
        everybody = processes.found(within=within)
    for process, found in enumerate(everybody):
        for (name, _, samplings), run in zip(runs, plan, strict=True):
            where = f"{run['name']}, process {process} of {count}"
            _same_logits(found[run["name"]], alone[name], where)
            if "classified" in alone[name]:
                classified = (np.array(one["classified"]) for one in (found[run["name"]], alone[name]))
                np.testing.assert_allclose(*classified, rtol=5e-4, atol=5e-5, err_msg=where)
            for sampling in samplings:
                assert found[run["name"]][sampling] == alone[name][sampling], f"{where}, {sampling}"


def _saved(name: str, folder: Path) -> Path:
    family = name.removesuffix(" for pre-training")
    return three_layers(family, folder, None if name == family else transformers.AutoModelForPreTraining)


def _same_logits(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    actual, wanted = np.array(found["logits"]), np.array(expected["logits"])
    assert actual.shape == wanted.shape, where
    for row, prompt in enumerate(PROMPTS):
        n = len(prompt)
        np.testing.assert_allclose(actual[row, :n], wanted[row, :n], rtol=5e-4, atol=5e-5, err_msg=f"{where}, {row}")


def test_two_processes(tmp_path: Path) -> None:
    _check(
        tmp_path,
        count=2,
        devices=2,
        runs=[
            ("llama", BOTH | {"sequence_parallel": True}, ("greedy",)),
            ("llama", {"data_parallel": 2}, ("seeded",)),
            ("llama", {"tensor_parallel": 2, "pipeline_parallel": 2, "prompt_pieces": 2}, ("choices", "stopped")),
            ("llama", {"tensor_parallel": 2}, ("greedy",)),
            ("gpt2", {"pipeline_parallel": 2, "prompt_pieces": 2}, ("seeded",)),
            ("gpt2", {"tensor_parallel": 4}, ("beams",)),
            ("falcon", {"pipeline_parallel": 2, "data_parallel": 2}, ("beams",)),
            ("bert for pre-training", BOTH, ()),
        ],
    )


def test_four_processes(tmp_path: Path) -> None:
    _check(tmp_path, count=4, devices=1, runs=[("bloom", BOTH, ("seeded",))])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_in_two_processes(name: str, tmp_path: Path) -> None:
    samplings = () if name in ENCODERS else ("greedy",)
    _check(tmp_path, count=2, devices=4, runs=[(name, degrees, samplings) for degrees in EVERY], within=900)


def test_processes_that_are_told_different_things(tmp_path: Path) -> None:
    model = pickled_model("gpt2", tmp_path / "model.pickle")
    with Run("disagreement", tmp_path, 2, 2) as processes:
        expected = answers(jdsi.init_inference(model_at(model)), ["greedy"])
        first, second = processes.found(within=120)
    for found in (first, second):
        assert "tensor_parallel is 2 in process 0 and 4 in process 1" in found["degrees"]
        assert "prompt_pieces is 1 in process 0 and 2 in process 1" in found["pieces"]
        assert "take a multiple of 2, up to 4" in found["devices"]
        assert "before JAX is used" in found["again"]
        assert "prompts is [[[3, 4]]] in process 0 and [[[3, 5]]] in process 1" in found["prompts"]
        assert "sampling is [[{'max_new_tokens': 2}]] in process 0" in found["sampling"]
        assert "sampling is" in found["function"]
        assert "call is 'generate' in process 0 and 'forward' in process 1" in found["call"]
        # Without a seed the answers are random, but the same everywhere.
        assert found["unseeded"] == first["unseeded"]
        assert found["unseeded"][0] != found["unseeded"][1]
        assert found["after"]["greedy"] == expected["greedy"]
        _same_logits(found["after"], expected, "after all errors")
