"""What every cache does, whoever runs the model: rows begin, roll back, are copied, joined and given to others."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jdsi
from checkpoints import save_llama
from jdsi.errors import ConfigError
from jdsi.kv_cache import Cache
from jdsi.runtime import Executor, Step
from jdsi.runtime.forward import WholeLogits, forward
from window_cache import Window

pytestmark = pytest.mark.usefixtures("quick_compilation")

PLACES: dict[str, dict[str, Any]] = {
    "one device": {},
    "mesh": {"tensor_parallel": 2, "data_parallel": 2},
    "pipeline": {"pipeline_parallel": 2},
    "streamed": {"offload": "nvme", "memory_limit": "600MiB"},
    "offloaded": {"offload": "nvme", "memory_limit": "600MiB", "kv_offload": "host", "tensor_parallel": 2},
}
WIDTH = 8  # of every step but single tokens, so that there are few programs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_llama(path)
    return path


@pytest.fixture(scope="module")
def plain(folder: Path) -> Executor:
    return jdsi.init_inference(folder).executor


@pytest.fixture(params=PLACES)
def executor(request: pytest.FixtureRequest, folder: Path) -> Iterator[Executor]:
    engine = jdsi.init_inference(folder, **PLACES[request.param])
    yield engine.executor
    engine.close()


class Rows:
    """A cache, and beside it the tokens that each of its rows should hold."""

    def __init__(self, executor: Executor, plain: Executor, rows: int) -> None:
        self.executor, self.plain = executor, plain
        self.cache, self.held = executor.new_cache(rows, 100), [[] for _ in range(rows)]

    def read(self, new: Sequence[Sequence[int]]) -> None:
        """A step that brings tokens to rows, maybe none to some; logits are those of whole sequences read at once."""
        width = 1 if all(len(one) == 1 for one in new) else WIDTH
        tokens = np.zeros((len(new), width), np.int32)
        for row, one in zip(tokens, new, strict=True):
            row[: len(one)] = one
        context = self.cache.begin(np.array([len(one) for one in new], np.int32), width)
        epilogue = WholeLogits(self.executor.spec.vocab_size)
        [(logits, self.cache, _)] = self.executor.steps([Step(tokens.reshape(-1), context, None, epilogue, ())])
        self.held = [[*old, *one] for old, one in zip(self.held, new, strict=True)]
        for row, (held, one) in enumerate(zip(self.held, new, strict=True)):
            if one:
                padded = np.array([held + [0] * (64 - len(held))], np.int32)
                expected = forward(self.plain, padded, np.array([len(held)], np.int32))[
                    0, len(held) - len(one) : len(held)
                ]
                own = np.asarray(logits).reshape(len(new), width, -1)[row, : len(one)]
                np.testing.assert_allclose(own, expected, rtol=2e-3, atol=2e-4, err_msg=f"row {row} of {held}")

    def set(self, cache: Cache, held: list[list[int]]) -> None:
        self.cache, self.held = cache, held
        assert cache.rows == len(held)


def test_rows_come_and_go(executor: Executor, plain: Executor) -> None:
    rows = Rows(executor, plain, 4)
    rows.read([[5, 9, 2, 7, 7, 1], [40, 8], [3], [250, 1, 2, 3, 4, 5, 6, 7]])
    rows.read([[11], [12], [13], [14]])
    back = np.array([2, 0, 1, 5])
    rows.set(rows.cache.rollback(back), [held[: len(held) - n] for held, n in zip(rows.held, back, strict=True)])
    rows.read([[21], [22], [23], [24]])  # other tokens than those that were taken back
    rows.set(rows.cache.select(np.array([1, 0, 3, 3])), [rows.held[i] for i in (1, 0, 3, 3)])
    rows.read([[31], [32], [33], [34]])
    rows.set(rows.cache.release([0, 3]), [[], *rows.held[1:3], []])
    rows.read([[60, 61, 62], [41], [], [70] * 8])  # prompts beside a row that goes on and one that waits
    rows.read([[51], [52], [53], [54]])
    others = Rows(executor, plain, 4)
    others.read([[9, 8, 7], [6], [5, 4], [3]])
    rows.set(type(rows.cache).join([rows.cache, others.cache]), rows.held + others.held)
    rows.read([[1], [2], [3], [4], [5], [6], [7], [8]])
    rows.set(rows.cache.select(np.array([0, 2, 5, 7])), [rows.held[i] for i in (0, 2, 5, 7)])
    rows.read([[91], [92], [93], [94]])


def test_a_cache_of_ones_own(folder: Path, tmp_path: Path) -> None:
    """It forgets what lies more than a window back, as a model does whose attention has that window."""
    size, prompts = 12, [[5, 9, 2, 7, 7, 1], list(range(40, 70)), [3]]
    save_llama(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"LlamaForCausalLM"', '"MistralForCausalLM"').replace(
            '"llama"', f'"mistral",\n"sliding_window": {size}'
        )
    )
    sampling = jdsi.SamplingParams(max_new_tokens=20, ignore_eos=True)
    expected = [one.token_ids for one in jdsi.init_inference(tmp_path).generate(prompts, sampling)]
    assert expected != [one.token_ids for one in jdsi.init_inference(folder).generate(prompts, sampling)]
    for name, options in PLACES.items():
        if "kv_offload" in options:
            continue
        engine = jdsi.init_inference(folder, cache=Window(size), **options)
        assert [one.token_ids for one in engine.generate(prompts, sampling)] == expected, name
        engine.close()


def test_what_is_no_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cache=.paged. must be a jdsi\.kv_cache\.CacheSpec"):
        jdsi.InferenceConfig(cache="paged")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="both say where keys and values live"):
        jdsi.InferenceConfig(offload="nvme", kv_offload="host", cache=Window(4))
