"""Files read straight into the arrays that programs use, with a stand-in for kvikio and CPU devices for GPUs."""

import contextlib
import json
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jdsi
from checkpoints import save_llama
from fake_kvikio import FakeKvikio, stand_in
from jdsi.cli import main
from jdsi.converters import convert
from jdsi.converters.block_store import BlockStore
from jdsi.converters.direct_io import PAGE, DirectReader, PageBuffer
from jdsi.errors import CheckpointError, ConfigError, JdsiError
from jdsi.runtime import device_reader, gpu_direct
from jdsi.runtime.gpu_direct import GPUDirectSource, gpu_direct_source
from jdsi.runtime.placement import streamed_weights
from jdsi.runtime.residency import Residency
from jdsi.runtime.streamed import StreamedExecutor
from jdsi.runtime.weight_sources import BlockSource, DiskSource
from jdsi.runtime.weight_stream import WeightStream
from jdsi.sharding import make_mesh
from zoo import three_layers

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = [[5, 9, 2, 7], [11, 4, 4, 60, 33, 21, 8], [3]]
SAMPLING = jdsi.SamplingParams(max_new_tokens=6, ignore_eos=True)


@pytest.fixture
def kvikio(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKvikio]:
    yield from stand_in(monkeypatch)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("direct") / "llama"
    save_llama(folder, num_hidden_layers=4)
    convert(folder, folder.with_name("streaming"), to="streaming")
    convert(folder, folder.with_name("int8"), to="streaming", quantize="int8")
    convert(folder, folder.with_name("cut2"), to="sharded", tensor_parallel=2)
    restored(folder, folder.with_name("mixed"), {"layers.1.": ml_dtypes.bfloat16, "layers.2.mlp": np.float16})
    return folder


def restored(folder: Path, target: Path, dtypes: dict[str, Any]) -> Path:
    """A copy of a safetensors folder, tensors with these words in their names in another dtype."""
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file)
        for words, dtype in dtypes.items():
            tensors |= {name: x.astype(dtype) for name, x in tensors.items() if words in name}
        save_file(tensors, target / file.name, metadata={"format": "pt"})
    return target


def nothing_kept(store: BlockStore, slots: int = 2) -> Residency:
    """Only what is never streamed stays."""
    head = store.spec.head
    last = ["embedding"] if head is not None and head.tied else ["head"] if "head" in store.blocks else []
    layers = [name for name in store.blocks if name.startswith("layers.")]
    streamed = ("embedding", *layers, *last)
    return Residency(frozenset(store.blocks) - set(streamed), streamed, slots, nbytes=0)


def direct_engine(
    folder: Path,
    batches: int = 1,
    make_source: Callable[[BlockStore], BlockSource] = GPUDirectSource,
    **degrees: int,
) -> jdsi.InferenceEngine:
    store = BlockStore.open(folder, tensor_parallel=degrees.get("tensor", 1))
    executor = StreamedExecutor(
        store,
        nothing_kept(store),
        dtype="float32",
        mesh=make_mesh(**degrees, devices=jax.devices()[: degrees.get("tensor", 1) * degrees.get("data", 1)]),
        source=make_source(store),
        batches_per_pass=batches,
    )
    return jdsi.InferenceEngine(executor, jdsi.InferenceConfig(dtype="float32", max_batch_size=2))


def tokens(engine: jdsi.InferenceEngine) -> list[list[int]]:
    return [completion.token_ids for completion in engine.generate(PROMPTS, SAMPLING)]


@pytest.mark.parametrize(
    ("layout", "degrees"),
    [
        ("llama", {}),
        ("llama", {"tensor": 2, "data": 2}),
        ("streaming", {}),
        ("streaming", {"tensor": 2, "data": 2}),
        ("mixed", {}),
        ("mixed", {"tensor": 2, "data": 2}),
        ("int8", {"tensor": 2, "data": 2}),
        ("cut2", {"tensor": 2, "data": 2}),
    ],
    ids=str,
)
def test_tokens_are_those_of_the_model_in_memory(
    llama: Path, kvikio: FakeKvikio, layout: str, degrees: dict[str, int]
) -> None:
    folder = llama.with_name(layout)
    expected = tokens(jdsi.init_inference(folder, dtype="float32", max_batch_size=2))
    with contextlib.closing(direct_engine(folder, batches=2, **degrees)) as engine:
        assert tokens(engine) == expected
        next(iter(engine.stream(PROMPTS[0], SAMPLING)))  # given up half-way
        assert tokens(engine) == expected
        report, streamed = engine.executor.stream_report(), engine.executor.residency.streamed
    assert report is not None
    blocks = BlockStore.open(folder, tensor_parallel=degrees.get("tensor", 1)).blocks
    stored = sum(f.nbytes * blocks[name].ranks for name in streamed for _, f in blocks[name].form.fields)
    assert sum(size for _, _, size, _ in kvikio.reads) >= (report.passes - 1) * stored
    assert report.passes > 12


@pytest.mark.parametrize(
    ("layout", "degrees"),
    [
        ("llama", (1, 1)),
        ("llama", (3, 2)),
        ("streaming", (1, 1)),
        ("streaming", (2, 2)),
        ("int8", (1, 1)),
        ("int8", (2, 4)),
        ("mixed", (2, 3)),
        ("cut2", (2, 1)),
        ("cut2", (2, 3)),
        ("gpt2", (1, 1)),
        ("gpt2", (2, 2)),
        ("bloom", (2, 2)),
        ("bert", (3, 1)),
    ],
)
def test_arrays_are_those_that_go_by_way_of_the_host(
    llama: Path, kvikio: FakeKvikio, monkeypatch: pytest.MonkeyPatch, layout: str, degrees: tuple[int, int]
) -> None:
    monkeypatch.setattr(device_reader, "_CHUNK", PAGE)
    folder = llama.with_name(layout)
    if not folder.exists():
        three_layers(layout, folder)
    store = BlockStore.open(folder, tensor_parallel=degrees[0])
    mesh = make_mesh(tensor=degrees[0], data=degrees[1], devices=jax.devices()[: degrees[0] * degrees[1]])
    blocks = [(block, streamed_weights(store.spec, block, mesh)) for block in store.blocks.values()]
    with contextlib.closing(GPUDirectSource(store)) as source, contextlib.closing(DirectReader()) as reader:
        source.prepare(blocks)
        buffer = source.buffer(blocks)
        for block, weights in blocks:
            found = source.begin(block, buffer, weights)()
            memory = PageBuffer(weights.memory_bytes(block.nbytes)).bytes
            reader.read(block.segments, memory)
            wanted = weights.put(memory, block.nbytes)
            for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                assert (ours.shape, ours.dtype, ours.sharding) == (theirs.shape, theirs.dtype, theirs.sharding)
            assert jax.tree.structure(found) == jax.tree.structure(wanted)
            fields = dict(block.form.fields)
            found = jax.tree.map(jnp.copy, found)  # as a program sees them; NumPy would see those of its first look
            for name, array in _stored(found, weights, block).items():
                np.testing.assert_array_equal(array, _stored(wanted, weights, block)[name], err_msg=name)
                assert array.nbytes == fields[name].nbytes * block.ranks


def _stored(arrays: Any, weights: Any, block: Any) -> dict[str, np.ndarray]:
    """A block's stored arrays as bytes, those of several ranks one behind another, without what lies between them."""
    if weights.mesh.size == 1:
        return {name: np.asarray(array).reshape(-1).view(np.uint8) for name, array in arrays.items()}
    found = {}
    for section, stretches in zip(weights.sections, arrays, strict=True):
        parts = np.asarray(stretches).view(np.uint8).reshape(block.ranks, -1)
        for name, field in section.fields:
            start = field.offset - section.offset
            found[name] = parts[:, start : start + field.nbytes].reshape(-1)
    return found


def load_norms(folder: Path) -> list[np.ndarray]:
    """The first norm of every layer."""
    tensors = load_file(folder / "model.safetensors")
    return [tensors[f"model.layers.{i}.input_layernorm.weight"] for i in range(4)]


def test_buffers_keep_their_arrays_until_another_form_comes(
    llama: Path, kvikio: FakeKvikio, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    plain = gpu_direct._Filled.of

    def tracked(weights: Any, make: Any) -> Any:
        # With the new ones there must be no more than there are buffers.
        alive.append(sum(ref() is not None for ref in made))
        filled = plain(weights, make)
        made.append(weakref.ref(jax.tree.leaves(filled.arrays)[0]))
        return filled

    monkeypatch.setattr(gpu_direct._Filled, "of", tracked)
    for layout, forms in (("llama", 1), ("mixed", 3)):
        made.clear()
        store = BlockStore.open(llama.with_name(layout))
        norms = load_norms(store.path)
        mesh = make_mesh(devices=jax.devices()[:1])
        names = [name for name in store.blocks if name.startswith("layers.")]
        blocks = [(store.blocks[name], streamed_weights(store.spec, store.blocks[name], mesh)) for name in names]
        assert len({weights for _, weights in blocks}) == forms
        kvikio.reads.clear()
        with contextlib.closing(WeightStream(GPUDirectSource(store), blocks, 2)) as stream:
            for turn in range(12):
                delivery = stream.take(names[turn % len(names)])
                found = np.array(delivery.arrays["attention_norm.weight"])
                np.testing.assert_array_equal(found, norms[turn % len(names)])
                delivery.release()
                del delivery
        assert len(made) == 2 if forms == 1 else len(made) > 2
        assert max(alive) == 1
        if forms == 1:
            addresses = {address for *_, address in kvikio.reads}
            assert len(addresses) == 2 * len(blocks[0][0].segments)


def test_an_engine_hears_of_errors_and_can_be_closed(llama: Path, tmp_path: Path, kvikio: FakeKvikio) -> None:
    convert(llama, tmp_path / "model", to="streaming")
    changed = direct_engine(tmp_path / "model")
    with contextlib.closing(changed):
        tokens(changed)
        os.utime(tmp_path / "model" / "weights.bin", ns=(1, 1))
        for _ in range(2):  # the first, and every later pass
            with pytest.raises(CheckpointError, match=r"weights\.bin was changed or replaced"):
                tokens(changed)
    failing = direct_engine(llama)
    with contextlib.closing(failing):
        tokens(failing)

        def fail(path: str, offset: int) -> None:
            raise RuntimeError("cuFile error")

        kvikio.before_read = fail
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"model\.safetensors: reading at byte \d+: cuFile error"):
                tokens(failing)
    assert kvikio.writing == 0


def test_an_engine_can_be_closed_while_it_reads(llama: Path, kvikio: FakeKvikio) -> None:
    engine = direct_engine(llama, tensor=2, data=2)
    for _ in zip(range(3), engine.stream(PROMPTS[0], SAMPLING), strict=False):
        pass
    go_on = threading.Event()
    kvikio.before_read = lambda path, offset: go_on.wait(60)
    threading.Timer(0.3, go_on.set).start()
    engine.close()
    assert kvikio.writing == 0
    assert not kvikio.open_files
    assert not [t for t in threading.enumerate() if t.name.startswith("jdsi-stream")]
    with pytest.raises(JdsiError, match="closed"):
        tokens(engine)


@pytest.mark.gpu
def test_tokens_on_a_gpu_are_those_by_way_of_the_host(llama: Path) -> None:
    pytest.importorskip("kvikio", reason="needs kvikio: pip install kvikio-cu13")
    for layout in ("llama", "streaming", "mixed", "int8"):
        found = []
        for source in (DiskSource, gpu_direct_source):
            with contextlib.closing(direct_engine(llama.with_name(layout), make_source=source)) as engine:
                found += [tokens(engine), tokens(engine)]
        assert all(each == found[0] for each in found), layout


def test_types_that_jax_narrows_are_refused(llama: Path, tmp_path: Path, kvikio: FakeKvikio) -> None:
    folder = restored(llama, tmp_path / "wide", {"layers.2.": np.float64})
    with pytest.raises(ConfigError, match=r"model\.safetensors: layers\.2 is stored as float64, which JAX narrows"):
        direct_engine(folder)
    convert(folder, tmp_path / "narrow", to="streaming", dtype="float32")  # as the message says
    with contextlib.closing(direct_engine(tmp_path / "narrow")) as engine:
        assert tokens(engine) == tokens(jdsi.init_inference(llama, dtype="float32", max_batch_size=2))


def test_the_setting(
    llama: Path, kvikio: FakeKvikio, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {
        "dtype": "float32",
        "offload": "nvme",
        "memory_limit": "400.4MiB",
        "max_tokens": 64,
        "max_batch_size": 2,
    }
    expected = tokens(jdsi.init_inference(llama, dtype="float32", max_batch_size=2))
    with pytest.raises(ConfigError, match=r"memory of GPUs, and JAX runs on cpu; leave it out"):
        jdsi.init_inference(llama, gpu_direct=True, **given)
    command = ["jdsi", "generate", str(llama), "--prompt-ids", "5,9,2,7", "--max-new-tokens", "6", "--ignore-eos"]
    command += ["--dtype", "float32", "--offload", "nvme", "--memory-limit", "400.4MiB", "--json", "--gpu-direct"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code
    assert "JAX runs on cpu" in capsys.readouterr().err

    monkeypatch.setattr("jdsi.runtime.offload.gpu_direct_source", GPUDirectSource)
    with contextlib.closing(jdsi.init_inference(llama, gpu_direct=True, **given)) as engine:
        assert engine.executor.stream_report() is not None
        assert tokens(engine) == expected
    assert kvikio.reads
    kvikio.reads.clear()
    with pytest.raises(SystemExit):
        main()
    assert json.loads(capsys.readouterr().out)["completions"][0]["token_ids"] == expected[0]
    assert kvikio.reads


def test_without_kvikio_it_says_how_to_install_it(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    monkeypatch.setitem(sys.modules, "kvikio", None)  # what the import system takes for absent
    with pytest.raises(ConfigError, match=r"gpu_direct needs kvikio.*pip install kvikio-cu13`, or kvikio-cu12 for"):
        gpu_direct_source(BlockStore.open(llama))
    monkeypatch.setitem(sys.modules, "kvikio", FakeKvikio())
    gpu_direct_source(BlockStore.open(llama)).close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_direct": True}, "gpu_direct is for offload='nvme'"),
        ({"gpu_direct": True, "offload": "host"}, "gpu_direct is for offload='nvme'"),
        ({"gpu_direct": True, "offload": "auto"}, "gpu_direct is for offload='nvme'"),
        ({"gpu_direct": 1, "offload": "nvme"}, "gpu_direct=1 must be true or false"),
        ({"aio": {"use_gds": True}}, "gpu_direct is for offload='nvme'"),
        ({"aio": {"use_gds": "yes"}}, "use_gds='yes', which must be true or false"),
        ({"aio": {"use_gdr": True}}, "did you mean 'use_gds'"),
        ({"aio": True}, "'aio'=True must be an object"),
        ({"aio": {"use_gds": True}, "gpu_direct": False, "offload": "nvme"}, "contradicts"),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        jdsi.InferenceConfig.from_dict(options)


def test_deepspeed_asks_for_it_in_its_own_words() -> None:
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/local"}}
    reader = {"block_size": 1 << 20, "queue_depth": 8, "thread_count": 1, "single_submit": False}
    for aio, direct in (({**reader, "use_gds": True}, True), ({"use_gds": False}, False), (reader, False)):
        config = jdsi.InferenceConfig.from_dict({"zero": zero, "aio": aio})
        assert config == jdsi.InferenceConfig(offload="nvme", gpu_direct=direct)
    assert jdsi.InferenceConfig.from_dict({"aio": None}) == jdsi.InferenceConfig()
