"""Weights that are streamed to several devices: the same answers as on one, whatever the degrees."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jdsi
from checkpoints import save_llama
from jdsi.converters import convert
from jdsi.converters.block_store import BlockStore
from jdsi.runtime.placement import Section
from jdsi.runtime.residency import Residency
from jdsi.runtime.streamed import StreamedExecutor
from jdsi.runtime.weight_sources import HostSource
from jdsi.sharding import make_mesh
from zoo import CONFIGS, ENCODERS, three_layers

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = [[5, 9, 2, 7], [11, 4, 4, 60, 33, 21, 8], [3]]
SAMPLINGS = (
    jdsi.SamplingParams(max_new_tokens=7, ignore_eos=True, logprobs=2),
    jdsi.SamplingParams(max_new_tokens=7, ignore_eos=True, temperature=0.8, top_p=0.9, seed=3),
)
BEAMS = jdsi.SamplingParams(max_new_tokens=5, num_beams=2)


def nothing_kept(store: BlockStore) -> Residency:
    """Only what is never streamed stays."""
    head = store.spec.head
    last = ["embedding"] if head is not None and head.tied else ["head"] if "head" in store.blocks else []
    layers = [name for name in store.blocks if name.startswith("layers.")]
    streamed = ("embedding", *layers, *last)
    return Residency(frozenset(store.blocks) - set(streamed), streamed, slots=2, nbytes=0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mesh") / "llama"
    save_llama(folder, num_hidden_layers=5)
    convert(folder, folder.with_name("streaming"), to="streaming")
    convert(folder, folder.with_name("narrow"), to="streaming", dtype="bfloat16")
    convert(folder, folder.with_name("int8"), to="streaming", quantize="int8")
    for ranks in (2, 3):
        convert(folder, folder.with_name(f"cut{ranks}"), to="sharded", tensor_parallel=ranks)
    return folder


Answer = tuple[np.ndarray, list[list[int]]]


@pytest.fixture(scope="module")
def expected(llama: Path) -> Callable[[str, jdsi.SamplingParams], Answer]:
    """Logits and tokens of a folder on one device; cut or in another order the weights are those of `llama`."""

    @functools.cache
    def engine(layout: str) -> jdsi.InferenceEngine:
        return jdsi.init_inference(llama.with_name(layout), dtype="float32", max_batch_size=2)

    @functools.cache
    def answer(layout: str, sampling: jdsi.SamplingParams) -> Answer:
        plain = engine(layout)
        return plain.forward(PROMPTS), [c.token_ids for c in plain.generate(PROMPTS, sampling)]

    return lambda layout, sampling: answer(layout if layout in ("narrow", "int8") else "llama", sampling)


# Sampling and beams with and without groups of rows, from both places; greedily the other layouts.
@pytest.mark.parametrize(
    ("layout", "degrees", "samplings"),
    [
        ("llama", {"tensor": 2}, (*SAMPLINGS, BEAMS)),
        ("streaming", {"data": 2}, (*SAMPLINGS, BEAMS)),
        ("narrow", {"tensor": 3, "data": 2}, SAMPLINGS[:1]),
        ("int8", {"tensor": 1}, SAMPLINGS[:1]),
        ("int8", {"tensor": 3, "data": 2}, SAMPLINGS[:1]),
        ("cut2", {"tensor": 2}, SAMPLINGS[:1]),
        ("cut3", {"tensor": 3, "data": 2}, SAMPLINGS[:1]),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else str(value),
)
def test_tokens_do_not_depend_on_the_mesh(
    llama: Path, layout: str, degrees: dict[str, int], samplings: tuple[jdsi.SamplingParams, ...], expected: Any
) -> None:
    folder = llama.with_name(layout)
    store, mesh = BlockStore.open(folder, tensor_parallel=degrees.get("tensor", 1)), make_mesh(**degrees)
    source = HostSource(store) if layout in ("llama", "cut3") else None
    executor = StreamedExecutor(
        store, nothing_kept(store), dtype="float32", mesh=mesh, source=source, batches_per_pass=2
    )
    engine = jdsi.InferenceEngine(executor, jdsi.InferenceConfig(dtype="float32", max_batch_size=2))
    with contextlib.closing(engine):
        for sampling in samplings:
            logits, tokens = expected(layout, sampling)
            np.testing.assert_allclose(engine.forward(PROMPTS), logits, rtol=5e-4, atol=5e-5)
            assert [c.token_ids for c in engine.generate(PROMPTS, sampling)] == tokens, sampling


# Matrices stored transposed, rows in another order with parallel residuals, heads of ALiBi, an encoder.
TELLING = ("gpt2", "falcon", "bloom", "bert")


@pytest.mark.parametrize("name", [n if n in TELLING else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
def test_every_family(name: str, tmp_path: Path) -> None:
    """Heads, widths and vocabularies that do not divide, stored layouts of all kinds."""
    folder = three_layers(name, tmp_path / name)
    expected = jdsi.init_inference(folder, dtype="float32")
    store = BlockStore.open(folder)
    mesh = make_mesh(tensor=3, data=2)
    executor = StreamedExecutor(store, nothing_kept(store), dtype="float32", mesh=mesh)
    with contextlib.closing(jdsi.InferenceEngine(executor, jdsi.InferenceConfig(dtype="float32"))) as engine:
        actual, wanted = np.asarray(engine.forward(PROMPTS)), np.asarray(expected.forward(PROMPTS))
        for row, prompt in enumerate(PROMPTS):
            n = len(prompt)
            np.testing.assert_allclose(actual[row, :n], wanted[row, :n], rtol=5e-4, atol=5e-5)
        if name not in ENCODERS:
            greedy = SAMPLINGS[0]
            tokens = [c.token_ids for c in expected.generate(PROMPTS, greedy)]
            assert [c.token_ids for c in engine.generate(PROMPTS, greedy)] == tokens


def test_every_device_fetches_an_equal_part(llama: Path) -> None:
    store = BlockStore.open(llama.with_name("streaming"))
    mesh = make_mesh(tensor=2, data=2)
    executor = StreamedExecutor(store, nothing_kept(store), dtype="float32", mesh=mesh)
    block = store.blocks["layers.0"]
    weights = executor._weights
    with contextlib.closing(executor), weights.block("embedding"), weights.block("layers.0") as arrived:
        sections = Section.of(block.form)
        assert len(sections) == 1
        for array in arrived.arrays:
            shares = {shard.device: shard.data.nbytes for shard in array.addressable_shards}
            assert list(shares) == list(mesh.devices.flat)
            assert len(set(shares.values())) == 1
            assert block.bytes_stored <= sum(shares.values()) + 4096 <= block.bytes_stored + 4096 + 4 * 128


def test_a_folder_cut_for_a_degree_is_streamed_with_that(llama: Path) -> None:
    with pytest.raises(jdsi.CheckpointError, match=r"cut for tensor_parallel=2 .* not with 3.*--to streaming"):
        BlockStore.open(llama.with_name("cut2"), tensor_parallel=3)
    whole, cut = BlockStore.open(llama), BlockStore.open(llama.with_name("cut2"), tensor_parallel=2)
    norms = 2 * whole.spec.width * 4
    layer = whole.blocks["layers.0"]
    assert cut.blocks["layers.0"].bytes_stored == layer.bytes_stored + norms  # norms are read for both


def test_the_engine_takes_degrees_and_limits(llama: Path) -> None:
    plain = jdsi.init_inference(llama, dtype="float32").generate(PROMPTS, SAMPLINGS[0])
    settings = {"offload": "nvme", "memory_limit": "420MiB", "max_tokens": 64, "max_batch_size": 4}
    engine = jdsi.init_inference(llama, dtype="float32", tensor_parallel=2, data_parallel=2, **settings)
    with contextlib.closing(engine):
        assert str(engine.executor.parallelism) == "tensor 2 x pipeline 1 x data 2"
        assert [c.token_ids for c in engine.generate(PROMPTS, SAMPLINGS[0])] == [c.token_ids for c in plain]
    with pytest.raises(jdsi.ConfigError, match=rf"tensor 2 x.*there are {len(jax.devices())}|data"):
        jdsi.init_inference(llama, tensor_parallel=2, data_parallel=len(jax.devices()), offload="nvme")
