"""What each process of a multi-process test runs: `python peer_worker.py SCENARIO FOLDER PROCESS COUNT PORT`.

A scenario writes what it found to FOLDER/PROCESS.json, and the time of a fault it was told to have to FOLDER/fault.
"""

import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

import jdsi

PROMPTS = [[5, 9, 2, 7], [11, 4, 4, 60, 33, 21, 8, 9, 10, 70, 71, 72], [3]]


def upwards(tokens: Any, lengths: Any, logits: Any) -> Any:
    """A logits processor."""
    return logits + 0.01 * jnp.arange(logits.shape[1])


def downwards(tokens: Any, lengths: Any, logits: Any) -> Any:
    """Another."""
    return -upwards(tokens, lengths, -logits)


class Letters:
    """A tokenizer of 26 letters, so that stop strings are soon met."""

    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "".join(chr(97 + token % 26) for token in token_ids)

    def convert_ids_to_tokens(self, ids: int) -> str:
        return self.decode([ids])

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int | None]:
        return [ord(token) - 97 if len(token) == 1 else None for token in tokens]


SAMPLINGS = {
    "greedy": jdsi.SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=2),
    "seeded": jdsi.SamplingParams(max_new_tokens=6, temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=3),
    "beams": jdsi.SamplingParams(max_new_tokens=5, num_beams=3),
    "stopped": jdsi.SamplingParams(max_new_tokens=6, num_beams=3, n=3, stop=[*"aeiou"]),
    "choices": jdsi.SamplingParams(
        max_new_tokens=5, temperature=0.9, seed=4, n=2, guidance_scale=1.5, logits_processor=upwards
    ),
}


def model_at(path: str | Path) -> Any:
    """A folder as it is; a module from a file with a pickled spec and parameters, for which less is imported."""
    if Path(path).is_dir():
        return path
    return jdsi.Transformer.from_parameters(*pickle.loads(Path(path).read_bytes()))


def answers(engine: jdsi.InferenceEngine, samplings: list[str]) -> dict[str, Any]:
    """Everything that must not depend on the mesh or the number of processes."""
    found: dict[str, Any] = {"logits": np.asarray(engine.forward(PROMPTS)).tolist()}
    if engine.spec.classifier is not None:
        found["classified"] = [one.logits.tolist() for one in engine.classify(PROMPTS)]
    for name in samplings:
        engine.tokenizer = Letters() if name == "stopped" else None
        completions = engine.generate(PROMPTS, SAMPLINGS[name])
        found[name] = [[c.token_ids for c in (first, *first.alternatives)] for first in completions]
    return found


def invariance(folder: Path, process: int) -> dict[str, Any]:
    """The answers of every engine in plan.json."""
    found = {}
    for run in json.loads((folder / "plan.json").read_text()):
        engine = jdsi.init_inference(model_at(run["model"]), dtype="float32", **run["degrees"])
        found[run["name"]] = answers(engine, run["samplings"])
    return found


def disagreement(folder: Path, process: int) -> dict[str, Any]:
    """The errors of processes that are told different things, and what an engine does after all of them."""

    def error(call: Callable[[], Any]) -> str:
        try:
            call()
        except jdsi.ConfigError as raised:
            return str(raised)
        return "no ConfigError"

    def engine(**degrees: Any) -> jdsi.InferenceEngine:
        return jdsi.init_inference(model_at(folder / "model.pickle"), **degrees)

    found: dict[str, Any] = {
        "degrees": error(lambda: engine(tensor_parallel=2 * (process + 1))),
        "pieces": error(lambda: engine(pipeline_parallel=2, prompt_pieces=process + 1)),
        "devices": error(lambda: engine(tensor_parallel=3)),
        "again": error(lambda: jdsi.sharding.initialize("127.0.0.1:1", 2, process)),
    }
    both = engine(data_parallel=2, pipeline_parallel=2)
    short = jdsi.SamplingParams(max_new_tokens=2)
    found["prompts"] = error(lambda: both.generate([[3, 4 + process]], short))
    longer = jdsi.SamplingParams(max_new_tokens=2 + process)
    found["sampling"] = error(lambda: both.generate([[3, 4]], longer))
    function = downwards if process else upwards
    function = jdsi.SamplingParams(max_new_tokens=2, logits_processor=function)
    found["function"] = error(lambda: both.generate([[3, 4]], function))
    found["call"] = error(lambda: both.forward([[3, 4]]) if process else both.generate([[3, 4]], short))
    unseeded = jdsi.SamplingParams(max_new_tokens=12, temperature=3.0, ignore_eos=True)
    found["unseeded"] = [[c.token_ids for c in both.generate(PROMPTS, unseeded)] for _ in range(2)]
    found["after"] = answers(both, ["greedy"])
    return found


def lost(folder: Path, process: int) -> dict[str, Any]:
    """Generates for ever, until the process that fault.json names has the fault named there, at its 12th step."""
    fault, victim = json.loads((folder / "fault.json").read_text())
    engine = jdsi.init_inference(model_at(folder.parent / "model.pickle"), tensor_parallel=2)
    executor: Any = engine.executor
    step, taken = executor.steps, 0

    def steps(batches: Any) -> Any:
        nonlocal taken
        taken += 1
        if process == victim and taken == 12:
            (folder / "fault").write_text(str(time.time()))
            if fault == "raises":
                raise RuntimeError("a fault of its own")
            if fault == "sleeps":
                time.sleep(1000)
            os.kill(os.getpid(), signal.SIGKILL if fault == "dies" else signal.SIGSTOP)
        return step(batches)

    executor.steps = steps
    while True:
        engine.generate(PROMPTS, SAMPLINGS["greedy"])


def alone(folder: Path, process: int) -> dict[str, Any]:
    """Never gets here: the others do not come."""
    raise AssertionError


def main() -> None:
    """Runs a scenario."""
    sys.modules["torch"] = None  # see without_torch
    scenario, folder, process, count, port = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
    patience = 3 if scenario == "alone" else 60
    jdsi.sharding.initialize(f"127.0.0.1:{port}", count, process, patience=patience)
    found = {"invariance": invariance, "disagreement": disagreement, "lost": lost, "alone": alone}[scenario](
        folder, process
    )
    (folder / f"{process}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
