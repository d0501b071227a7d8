"""Stop strings in beam search, against transformers on the same model and tokenizer."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import jdsi
from checkpoints import save_llama
from jdsi import SamplingParams

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_llama(path)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> jdsi.InferenceEngine:
    return jdsi.init_inference(folder)


def all_of(completion: jdsi.Completion) -> list[jdsi.Completion]:
    return [completion, *completion.alternatives]


def cases(engine: jdsi.InferenceEngine, count: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts, and searches that end at pieces of what their beams would say."""
    rng, found = random.Random(0), []
    while len(found) < count:
        prompt = [rng.randrange(1, 300) for _ in range(rng.randrange(2, 8))]
        plain = engine.generate([prompt], SamplingParams(max_new_tokens=10, num_beams=3, n=3))[0]
        texts = [c.text for c in all_of(plain)[:2] if len(c.text) > 4]
        starts = [(text, rng.randrange(1, len(text) - 2)) for text in texts]
        stop = [
            piece for text, at in starts if (piece := text[at : at + rng.randrange(1, 4)]) and "\ufffd" not in piece
        ]
        if stop:
            early, penalty = rng.choice([True, False, "never"]), rng.choice([0.5, 1.0, 2.0])
            options: dict[str, Any] = {"early_stopping": early, "length_penalty": penalty, "stop": stop}
            found.append((prompt, SamplingParams(max_new_tokens=10, num_beams=3, n=3, **options)))
    return found


def test_equals_transformers(folder: Path, engine: jdsi.InferenceEngine) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    stopped = 0
    for prompt, params in cases(engine, 8):
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]),
                num_beams=3,
                num_return_sequences=3,
                early_stopping=params.early_stopping,
                length_penalty=params.length_penalty,
                max_new_tokens=10,
                do_sample=False,
                stop_strings=list(params.stop),
                tokenizer=engine.tokenizer,
                pad_token_id=0,
                output_scores=True,
                return_dict_in_generate=True,
            )
        found = all_of(engine.generate([prompt], params)[0])
        for ours, theirs in zip(found, out.sequences[:, len(prompt) :].tolist(), strict=True):
            ends = len(ours.token_ids)
            assert ours.token_ids == theirs[:ends]
            assert not any(theirs[ends:])
            if ours.finish_reason == "stop" and ours.token_ids[-1] != 0:
                stopped += 1
                assert not any(stop in ours.text for stop in params.stop)
        assert [c.score for c in found] == pytest.approx(out.sequences_scores.tolist(), rel=1e-4)
    assert stopped > 4


def test_neither_neighbours_nor_the_mesh_matter(folder: Path, engine: jdsi.InferenceEngine) -> None:
    prompts, params = map(list, zip(*cases(engine, 4), strict=True))
    prompts.append([5, 9, 2])
    params.append(SamplingParams(max_new_tokens=6, num_beams=3, n=3))
    alone = [engine.generate([p], s)[0] for p, s in zip(prompts, params, strict=True)]
    expected = [[c.token_ids for c in all_of(one)] for one in alone]
    spread = jdsi.init_inference(folder, data_parallel=2, pipeline_parallel=2)
    for other in (engine, spread):
        found = other.generate(prompts, params)
        assert [[c.token_ids for c in all_of(one)] for one in found] == expected
        assert [c.text for c in found] == [c.text for c in alone]
