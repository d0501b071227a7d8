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
    save_llama(path, vocab_size=304)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>", "<e2>"]})
    tokenizer.save_pretrained(path)
    return path


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


def check(torch_model: Any, engine: jdsi.InferenceEngine, prompt: list[int], params: SamplingParams) -> int:
    """Compares a search with that of `transformers`, and tells how many of its results a stop string ended."""
    own = params.filled()
    with torch.no_grad():
        out = torch_model.generate(
            torch.tensor([prompt]),
            num_beams=own.num_beams,
            num_return_sequences=own.n,
            early_stopping=own.early_stopping,
            length_penalty=own.length_penalty,
            max_new_tokens=own.max_new_tokens,
            do_sample=False,
            sequence_bias=dict(own.logit_bias) or None,
            stop_strings=list(own.stop),
            tokenizer=engine.tokenizer,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
    stopped, found = 0, all_of(engine.generate([prompt], params)[0])
    for ours, theirs in zip(found, out.sequences[:, len(prompt) :].tolist(), strict=True):
        ends = len(ours.token_ids)
        assert ours.token_ids == theirs[:ends]
        assert not any(theirs[ends:])
        if ours.finish_reason == "stop" and ours.token_ids[-1] != 0:
            stopped += 1
            assert not any(stop in ours.text for stop in own.stop)
    assert [c.score for c in found] == pytest.approx(out.sequences_scores.tolist(), rel=1e-4)
    return stopped


def test_equals_transformers(torch_model: Any, engine: jdsi.InferenceEngine) -> None:
    assert sum(check(torch_model, engine, *case) for case in cases(engine, 10)) > 3


def test_the_text_of_special_tokens_counts(torch_model: Any, engine: jdsi.InferenceEngine) -> None:
    end, e2 = engine.tokenizer.convert_tokens_to_ids(["<end>", "<e2>"])
    rng, stopped = random.Random(1), 0
    for stop in ("<end>", "nd>", "e", "<e2><end>", "2>") * 2:
        prompt = [rng.randrange(1, 300) for _ in range(4)]
        params = SamplingParams(max_new_tokens=10, num_beams=3, n=3, stop=stop, logit_bias={end: 4.0, e2: 4.0})
        stopped += check(torch_model, engine, prompt, params)
    assert stopped > 10


def test_a_stop_string_may_begin_within_the_least_tokens(engine: jdsi.InferenceEngine) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "n": 3, "ignore_eos": True}
    tokens = engine.generate([[5, 9, 2]], SamplingParams(**options))[0].token_ids
    texts = [engine.tokenizer.decode(tokens[:end]) for end in range(9)]
    cut = "\ufffd"  # for bytes that are no character yet
    at = next(n for n in range(2, 8) if cut not in texts[n][-1:] + texts[n + 1][len(texts[n]) :])
    options["stop"] = texts[at + 1][len(texts[at]) - 1 :]
    free, bound = (
        all_of(engine.generate([[5, 9, 2]], SamplingParams(min_new_tokens=least, **options))[0])
        for least in (0, at + 1)  # no beam completes it sooner
    )
    assert (tokens[: at + 1], "stop") in [(c.token_ids, c.finish_reason) for c in free]
    assert [(c.token_ids, c.score) for c in free] == [(c.token_ids, c.score) for c in bound]


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
