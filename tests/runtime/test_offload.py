"""Weights outside the device: the same tokens and logits wherever they live, errors instead of stale weights."""

import contextlib
import os
import re
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jdsi
from checkpoints import save_llama
from jdsi.converters import convert
from jdsi.converters.block_store import BlockStore
from jdsi.errors import CapacityError, CheckpointError, ConfigError, JdsiError
from jdsi.kv_cache import Contiguous
from jdsi.runtime.kv_demand import KVPlace, most_slots
from jdsi.runtime.offload import PROCESS_BYTES, footprint_on, plan_offload
from jdsi.runtime.placement import streamed_weights
from jdsi.runtime.residency import Footprint, plan_residency
from jdsi.runtime.streamed import StreamedExecutor
from jdsi.runtime.weight_sources import DiskSource, HostSource
from jdsi.runtime.weight_stream import WeightStream
from jdsi.sharding import make_mesh
from zoo import three_layers

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = [[5, 9, 2, 7], [11, 4, 4, 60, 33, 21, 8], [3]]
SAMPLING = jdsi.SamplingParams(max_new_tokens=7, ignore_eos=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offload") / "llama"
    save_llama(folder, num_hidden_layers=9)
    return folder


@pytest.fixture(scope="module")
def streaming(llama: Path) -> Path:
    convert(llama, llama.with_name("streaming"), to="streaming")
    return llama.with_name("streaming")


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[list[int]]:
    engine = jdsi.init_inference(llama, dtype="float32")
    return [c.token_ids for c in engine.generate(PROMPTS, SAMPLING)]


OTHERS = (("llama", 0, True), ("streaming", 0, False), ("streaming", 2, True))


def limit_for(folder: Path, layers: int, edges: bool = True, *, batch: int = 64, max_tokens: int = 256) -> int:
    """The memory limit that keeps so many layers, and the embedding and the head or not."""
    store = BlockStore.open(folder)
    size = {name: block.nbytes for name, block in store.blocks.items()}
    layer = size["layers.0"]
    streamed = layer if edges else max(size.values())
    kept = {name: block.form.nbytes_as(np.dtype("float32")) for name, block in store.blocks.items()}
    weights = 3 * streamed + kept["norm"] + layers * kept["layers.0"]
    weights += (kept["embedding"] + kept["head"]) if edges else 0
    made = {name: block.form.made_bytes(np.dtype("float32")) for name, block in store.blocks.items()}
    if made["layers.0"]:  # the memory that layers of another type are widened into
        weights += kept["layers.0"]
    weights += 0 if edges else max(made["embedding"], made["head"])
    kv = Contiguous().bytes(store.spec.kv_shapes, batch, most_slots(max_tokens), "float32")
    return PROCESS_BYTES + weights + min(kv, weights)  # for KV no more than half is set aside


@pytest.mark.parametrize(
    ("layout", "layers", "edges"),
    [
        ("llama", 0, False),
        ("llama", 2, True),
        ("streaming", 0, True),
        *(pytest.param(*rest, marks=pytest.mark.slow) for rest in OTHERS),
    ],
)
def test_tokens_do_not_depend_on_where_weights_live(
    layout: str, layers: int, edges: bool, request: pytest.FixtureRequest, expected: list[list[int]]
) -> None:
    folder = request.getfixturevalue(layout)
    engine = jdsi.init_inference(
        folder,
        dtype="float32",
        offload="nvme",
        memory_limit=limit_for(folder, layers, edges, batch=1),
        max_batch_size=1,
    )
    streamed = engine.executor.residency.streamed
    assert len([name for name in streamed if name.startswith("layers.")]) == 9 - layers
    assert ("embedding" in streamed) is not edges
    assert [c.token_ids for c in engine.generate(PROMPTS, SAMPLING)] == expected
    # A pass that is given up half-way must not shift what the next one gets.
    next(iter(engine.stream(PROMPTS[0], SAMPLING)))
    assert [c.token_ids for c in engine.generate(PROMPTS, SAMPLING)] == expected
    engine.close()


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_batches_share_a_pass(llama: Path, expected: list[list[int]], batches: int) -> None:
    store = BlockStore.open(llama)
    executor = StreamedExecutor(
        store, plan_residency(footprint_on(store, np.dtype("float32")), None), dtype="float32", batches_per_pass=batches
    )
    config = jdsi.InferenceConfig(dtype="float32", max_batch_size=1)
    engine = jdsi.InferenceEngine(executor, config)
    passes = -(-3 // batches) * 7
    assert [c.token_ids for c in engine.generate(PROMPTS, SAMPLING)] == expected
    report = executor.stream_report()  # in all: what was read before a call is not in the call's own report
    assert report is not None
    stored = sum(store.blocks[name].bytes_stored for name in executor.residency.streamed)
    slack = executor.residency.slots * max(store.blocks[name].bytes_stored for name in executor.residency.streamed)
    assert passes * stored <= report.bytes_streamed <= passes * stored + slack
    engine.close()


def test_logits_and_beams(llama: Path, streaming: Path) -> None:
    plain = jdsi.init_inference(llama, dtype="float32")
    engine = jdsi.init_inference(
        streaming, dtype="float32", offload="nvme", memory_limit=limit_for(streaming, 0, False)
    )
    rows = [[1, 2, 3, 4], [5, 6, 7, 8]]
    np.testing.assert_allclose(engine.forward(rows), plain.forward(rows), rtol=1e-5, atol=1e-5)
    beams = jdsi.SamplingParams(max_new_tokens=5, num_beams=2)
    assert engine.generate(PROMPTS[0], beams)[0].token_ids == plain.generate(PROMPTS[0], beams)[0].token_ids
    engine.close()


def test_host_offload_and_auto(llama: Path, expected: list[list[int]]) -> None:
    for settings in (
        {"offload": "host"},
        {"offload": "auto"},
        {"zero": {"stage": 3, "offload_param": {"device": "cpu"}}},
    ):
        engine = jdsi.init_inference(llama, dtype="float32", **settings)
        assert [c.token_ids for c in engine.generate(PROMPTS, SAMPLING)] == expected
        engine.close()


def test_narrow_weights_are_widened_as_when_loaded(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "narrow", to="streaming", dtype="bfloat16")
    plain = jdsi.init_inference(tmp_path / "narrow", dtype="float32")
    engine = jdsi.init_inference(
        tmp_path / "narrow", dtype="float32", offload="nvme", memory_limit=limit_for(tmp_path / "narrow", 0, False)
    )
    np.testing.assert_allclose(engine.forward([[1, 2, 3]]), plain.forward([[1, 2, 3]]), rtol=1e-5, atol=1e-5)
    engine.close()


def test_a_limit_too_small_says_what_is_needed(llama: Path) -> None:
    with pytest.raises(
        CapacityError, match=r"memory_limit=[\d,]+ is too small: to stream it takes [\d,]+ bytes"
    ) as told:
        jdsi.init_inference(llama, offload="nvme", dtype="float32", memory_limit=PROCESS_BYTES + 1000)
    least = re.search(r"takes ([\d,]+)", str(told.value))
    assert least is not None
    enough = int(least[1].replace(",", ""))
    jdsi.init_inference(llama, offload="nvme", dtype="float32", memory_limit=enough).close()
    with pytest.raises(ConfigError, match="memory_limit is for offload"):
        jdsi.init_inference(llama, memory_limit="1GiB")
    with pytest.raises(ConfigError, match="did you mean 'nvme'"):
        jdsi.init_inference(llama, offload="nvm")


def test_a_changed_file_is_an_error_not_other_weights(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "model", to="streaming")
    engine = jdsi.init_inference(
        tmp_path / "model", dtype="float32", offload="nvme", memory_limit=limit_for(tmp_path / "model", 0, False)
    )
    engine.generate(PROMPTS[0], SAMPLING)
    file = tmp_path / "model" / "weights.bin"
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"weights\.bin was changed or replaced"):
        engine.generate(PROMPTS[0], SAMPLING)
    with pytest.raises(CheckpointError, match=r"weights\.bin was changed"):
        engine.generate(PROMPTS[0], SAMPLING)
    engine.close()


def test_a_file_replaced_before_it_is_read_is_an_error(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "model", to="streaming")
    store = BlockStore.open(tmp_path / "model")
    file = tmp_path / "model" / "weights.bin"
    (tmp_path / "other").write_bytes(file.read_bytes())
    os.replace(tmp_path / "other", file)
    residency = plan_residency(footprint_on(store, np.dtype("float32")), None)
    with pytest.raises(CheckpointError, match=r"weights\.bin was changed or replaced after it was opened"):
        StreamedExecutor(store, residency, dtype="float32")


def test_weights_in_pinned_host_memory_are_moved_for_every_pass(llama: Path, expected: list[list[int]]) -> None:
    """The CPU backend has the memory kind too, and refuses to compute with what was not moved."""
    store = BlockStore.open(llama)
    residency = plan_residency(footprint_on(store, np.dtype("float32")), None)
    executor = StreamedExecutor(store, residency, dtype="float32", source=HostSource(store))
    engine = jdsi.InferenceEngine(executor, jdsi.InferenceConfig(dtype="float32"))
    assert [c.token_ids for c in engine.generate(PROMPTS, SAMPLING)] == expected
    engine.close()


def test_deliveries_give_their_memory_back_once(llama: Path) -> None:
    store = BlockStore.open(llama)
    mesh = make_mesh(devices=jax.devices()[:1])
    blocks = [store.blocks["layers.0"], store.blocks["layers.1"]]
    stream = WeightStream(
        DiskSource(store), [(block, streamed_weights(store.spec, block, mesh)) for block in blocks], 2
    )
    for turn in range(6):  # forgotten, released, released twice: with a buffer lost or gained this would hang or mix
        delivery = stream.take(f"layers.{turn % 2}")
        if turn % 3:
            delivery.release()
        if turn % 3 == 2:
            delivery.release()
        del delivery
    stream.close()
    with pytest.raises(JdsiError, match="closed"):
        stream.take("layers.0")


def test_closing_ends_the_thread(llama: Path) -> None:
    before = threading.active_count()
    engine = jdsi.init_inference(llama, dtype="float32", offload="nvme", memory_limit=limit_for(llama, 0, False))
    assert threading.active_count() > before
    engine.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("jdsi-")]


def test_plan_prefers_the_fastest_place(llama: Path) -> None:
    store = BlockStore.open(llama)
    narrow = {"max_tokens": 64, "max_batch_size": 1}
    footprint = footprint_on(store, np.dtype("float32"))
    assert plan_offload(footprint, "auto", PROCESS_BYTES + (1 << 30), **narrow).where == "device"
    small = limit_for(llama, 0, batch=1, max_tokens=64)
    assert plan_offload(footprint, "auto", small, **narrow).where == "nvme"
    more = plan_offload(footprint, "nvme", PROCESS_BYTES + (1 << 30), **narrow)
    assert more.residency.streamed == ()
    assert more.batches_per_pass > 10


def test_batches_that_must_share_a_pass_come_before_layers(llama: Path, expected: list[list[int]]) -> None:
    footprint = footprint_on(BlockStore.open(llama), np.dtype("float32"))
    sizes = {"max_tokens": 64, "max_batch_size": 1}
    limit = limit_for(llama, 6, batch=1, max_tokens=64)
    latency = plan_offload(footprint, "nvme", limit, **sizes)
    kept = len(latency.residency.resident)
    for wanted in (2, 3):
        plan = plan_offload(footprint, "nvme", limit, **sizes, batches_per_pass=wanted)
        assert (plan.batches_per_pass, len(plan.residency.resident) < kept) == (wanted, True)
        assert (
            plan.residency.nbytes + Contiguous().bytes(footprint.store.spec.kv_shapes, wanted, 128, footprint.dtype)
            <= limit
        )
        kept = len(plan.residency.resident)
    with pytest.raises(CapacityError, match=r"is too small: to stream it takes [\d,]+ bytes") as told:
        plan_offload(footprint, "nvme", limit, **sizes, batches_per_pass=100)
    enough = int(re.findall(r"takes ([\d,]+)", str(told.value))[0].replace(",", ""))
    assert plan_offload(footprint, "nvme", enough, **sizes, batches_per_pass=100).batches_per_pass == 100
    with pytest.raises(ConfigError, match="batches_per_pass is for offload"):
        jdsi.init_inference(llama, batches_per_pass=2)
    with pytest.raises(ConfigError, match="batches_per_pass=0 must be an integer of at least 1"):
        jdsi.init_inference(llama, offload="nvme", batches_per_pass=0)
    options = {"dtype": "float32", "offload": "nvme", "memory_limit": limit, "max_batch_size": 1, "max_tokens": 64}
    with contextlib.closing(jdsi.init_inference(llama, **options, batches_per_pass=3)) as engine:
        assert [c.token_ids for c in engine.generate(PROMPTS, SAMPLING)] == expected
        report = engine.stats.stream
        assert report is not None
        assert report.passes == SAMPLING.max_new_tokens


def test_batches_that_must_share_a_pass_need_room_for_what_waits(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jdsi.runtime.kv_demand.available_host_memory", lambda: 10 << 20)
    footprint = footprint_on(BlockStore.open(llama), np.dtype("float32"))
    sizes: Any = {"max_tokens": 64, "max_batch_size": 1, "kv_place": KVPlace("host")}
    most = plan_offload(footprint, "nvme", PROCESS_BYTES + (1 << 30), **sizes).batches_per_pass
    plan_offload(footprint, "nvme", PROCESS_BYTES + (1 << 30), **sizes, batches_per_pass=most)
    with pytest.raises(CapacityError, match=rf"do not fit where kv_offload='host' puts them, {most} would"):
        plan_offload(footprint, "nvme", PROCESS_BYTES + (1 << 30), **sizes, batches_per_pass=most + 1)
    # On a GPU they take none of its memory, so that only their place limits how many there may be.
    gpu = Footprint(footprint.store, footprint.dtype, shared=False)
    assert plan_offload(gpu, "nvme", 1 << 30, **sizes).batches_per_pass == 16
    assert plan_offload(gpu, "nvme", 1 << 30, **sizes, batches_per_pass=20).batches_per_pass == 20


def test_keys_and_values_beyond_the_limit_are_refused(llama: Path) -> None:
    limit = limit_for(llama, 0, batch=1, max_tokens=64)
    engine = jdsi.init_inference(llama, dtype="float32", offload="nvme", memory_limit=limit, max_batch_size=8)
    few = jdsi.SamplingParams(max_new_tokens=2)
    engine.generate(PROMPTS[0], few)
    with pytest.raises(
        CapacityError, match=r"8 rows of [\d,]+ tokens take [\d,]+ bytes.*leaves [\d,]+; lower max_batch"
    ):
        engine.generate([[5] * 200] * 8, few)
    engine.close()


def test_host_memory_has_a_limit_too(llama: Path) -> None:
    with pytest.raises(CapacityError, match=r"do not fit host memory, [\d,]+ are left for them; offload='nvme'"):
        jdsi.init_inference(llama, dtype="float32", offload="host", memory_limit=PROCESS_BYTES + 1000)


def test_an_encoder_is_streamed_by_name(tmp_path: Path) -> None:
    folder = three_layers("bert", tmp_path / "bert")
    expected = jdsi.init_inference(folder, dtype="float32").forward(PROMPTS)
    weights = plan_residency(footprint_on(BlockStore.open(folder), np.dtype("float32")), None, stream=False).nbytes
    for offload in ("nvme", "auto"):
        limit = PROCESS_BYTES + weights - 1
        engine = jdsi.init_inference(folder, dtype="float32", offload=offload, memory_limit=limit)
        assert engine.executor.residency.streamed
        np.testing.assert_allclose(engine.forward(PROMPTS), expected, rtol=1e-4, atol=1e-5)
        engine.close()
    with pytest.raises(ConfigError, match="this bert model does not"):
        jdsi.init_inference(folder, offload="nvme", kv_offload="host")


def test_a_plan_counts_all_that_batches_take(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("offload", "kv_demand"):
        monkeypatch.setattr(f"jdsi.runtime.{module}.available_host_memory", lambda: 1 << 34)
    store = BlockStore.open(llama)
    here = footprint_on(store, np.dtype("float32"))
    sizes = {"max_tokens": 128, "max_batch_size": 4}
    assert most_slots(128) == 256  # a prompt of 65 tokens is padded to 128, and 63 may follow
    limit = PROCESS_BYTES + (8 << 20)
    plan = plan_offload(here, "nvme", limit, **sizes, kv_place=KVPlace("nvme"))
    hidden = 4 * 256 * store.spec.width * 4
    assert 1 < plan.batches_per_pass <= 1 + (8 << 20) // hidden
    with pytest.raises(ConfigError, match="devices_per_link=2 exceeds the 1 devices"):
        plan_offload(here, "nvme", limit, **sizes, kv_place=KVPlace("nvme", devices_per_link=2))
    gpus = [Footprint(store, here.dtype, tensor, data, shared=False) for tensor, data in ((1, 1), (1, 4), (2, 1))]
    found = [plan_offload(gpu, "nvme", 1 << 30, **sizes, kv_place=KVPlace("host")).batches_per_pass for gpu in gpus]
    # They share the host's memory, so their number does not make it more.
    assert max(found) == min(found) > 1
