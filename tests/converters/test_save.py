"""Saving what an engine runs: from any mesh to any layout, and back to any mesh; by one process or two."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jdsi
from jdsi.converters import (
    MemoryParameters,
    ShardedCheckpoint,
    ShardedParameters,
    convert,
    from_arrays,
    load_model,
    open_checkpoint,
    save_parameters,
)
from jdsi.errors import CheckpointError, ConfigError
from jdsi.models import parameters
from jdsi.sharding import make_mesh, stage_meshes
from sharded import save
from without_torch import WITHOUT_TORCH

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = [[5, 9, 2, 7, 11], [3, 4]]
TIED, UNTIED, TRANSPOSING = "llama-gqa", "llama-3-heads", "gpt2"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in (TIED, UNTIED, TRANSPOSING):
        save(name, root / name)
        file = root / name / "model.safetensors"
        tensors = load_file(file)
        for tensor in tensors.values():
            tensor.reshape(-1)[1::7] = -0.0  # which a sum with zeros would turn into 0.0
        save_file(tensors, file, metadata={"format": "pt"})
        (root / name / "merges.txt").write_text("made up")
    return root


def engine_of(model: Any, **degrees: Any) -> jdsi.InferenceEngine:
    return jdsi.init_inference(model, dtype="float32", tokenizer=object(), **degrees)


def logits(engine: jdsi.InferenceEngine) -> list[np.ndarray]:
    found = np.asarray(engine.forward(PROMPTS))
    return [found[row, : len(prompt)] for row, prompt in enumerate(PROMPTS)]


def check_logits(engine: jdsi.InferenceEngine, wanted: list[np.ndarray]) -> None:
    for row, expected in zip(logits(engine), wanted, strict=True):
        np.testing.assert_allclose(row, expected, rtol=5e-4, atol=5e-5)


def check_bits(folder: Path, original: Path) -> None:
    before, after = load_file(original / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype, name
        assert tensor.shape == before[name].shape, name
        assert tensor.tobytes() == before[name].tobytes(), name


@pytest.mark.parametrize("name", [TIED, UNTIED, TRANSPOSING])
def test_what_one_mesh_saves_any_other_restores(name: str, folders: Path, tmp_path: Path) -> None:
    engine = engine_of(folders / name, tensor_parallel=2, pipeline_parallel=2)
    wanted = logits(engine_of(folders / name))
    assert engine.save(tmp_path / "orbax") == tmp_path / "orbax"
    assert (tmp_path / "orbax" / "merges.txt").read_text() == "made up"
    meshes: list[dict[str, int]] = [{}, {"tensor_parallel": 4}, {"tensor_parallel": 3, "data_parallel": 2}]
    for i, degrees in enumerate(meshes):
        again = engine_of(tmp_path / "orbax", **degrees)
        check_logits(again, wanted)
        again.save(tmp_path / f"hf{i}", to="hf")
        check_bits(tmp_path / f"hf{i}", folders / name)
    engine.save(tmp_path / "cut", to="sharded")
    opened = open_checkpoint(tmp_path / "cut")
    assert isinstance(opened, ShardedCheckpoint)
    assert opened.ranks == 2
    check_logits(engine_of(tmp_path / "cut", tensor_parallel=2), wanted)
    convert(tmp_path / "cut", tmp_path / "back", to="hf")
    check_bits(tmp_path / "back", folders / name)
    engine.save(tmp_path / "streaming", to="streaming")
    check_logits(engine_of(tmp_path / "streaming", offload="nvme"), wanted)
    check_logits(engine, wanted)  # saving has changed nothing


def test_weights_are_saved_in_the_type_they_have(folders: Path, tmp_path: Path) -> None:
    convert(folders / TIED, tmp_path / "wanted", to="hf", dtype="bfloat16")
    for name, degrees in {"one": {}, "spread": {"tensor_parallel": 3}}.items():
        jdsi.init_inference(folders / TIED, dtype="bfloat16", **degrees).save(tmp_path / name, to="hf")
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "bfloat16"
        found, wanted = ((tmp_path / f / "model.safetensors").read_bytes() for f in (name, "wanted"))
        assert found == wanted


def test_a_model_in_memory_is_saved_like_another_folder(folders: Path, tmp_path: Path) -> None:
    model = load_model(folders / UNTIED, dtype="float32")
    for name, degrees in {"one": {}, "spread": {"tensor_parallel": 2, "pipeline_parallel": 2}}.items():
        engine = engine_of(model, **degrees)
        with pytest.raises(ConfigError, match="in memory, with no config to go along; give like="):
            engine.save(tmp_path / name)
        assert not (tmp_path / name).exists()
        engine.save(tmp_path / name, like=folders / UNTIED / "config.json", to="hf")
        check_bits(tmp_path / name, folders / UNTIED)


def test_parameters_are_saved_without_an_engine(folders: Path, tmp_path: Path) -> None:
    model = load_model(folders / TRANSPOSING, dtype="float32")
    arrays = parameters(model)
    spread = from_arrays(arrays, model.spec, stage_meshes(make_mesh(tensor=3))[0])
    for name, source in {"plain": MemoryParameters(arrays), "mesh": ShardedParameters(spread, model.spec, 3)}.items():
        report = save_parameters(source, tmp_path / name, like=folders / TRANSPOSING, to="hf")
        check_bits(tmp_path / name, folders / TRANSPOSING)
        assert report.bytes == sum(array.nbytes for array in arrays.values())
        assert report.files == ("config.json", "generation_config.json", "merges.txt", "model.safetensors")
    arrays.pop("norm.bias")
    with pytest.raises(CheckpointError, match=r"what is to be saved like .* does not fit .*\n  missing: norm\.bias"):
        save_parameters(MemoryParameters(arrays), tmp_path / "part", like=folders / TRANSPOSING)
    assert not (tmp_path / "part").exists()


def test_refusals_leave_everything_as_it_was(folders: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(folders / TIED, tmp_path / "source"))
    other = Path(shutil.copytree(folders / TIED, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))  # the same shapes, another model
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    before = sorted(map(str, tmp_path.rglob("*")))
    for engine in (engine_of(source), engine_of(source, tensor_parallel=2)):
        for error, message, path, options in (
            (CheckpointError, "apart from the source", "source", {"overwrite": True}),
            (CheckpointError, "exists; choose another", "other", {}),
            (CheckpointError, "not a checkpoint, so it is not overwritten", "taken", {"overwrite": True}),
            (CheckpointError, "no such folder", "new", {"like": tmp_path / "no such"}),
            (ConfigError, "describes another model than the llama", "new", {"like": other}),
            (ConfigError, "describes another model than the llama", "new", {"like": folders / TRANSPOSING}),
            (ConfigError, "wanted is 'orbax'", "new", {"to": "pickle"}),
            (ConfigError, "for to='sharded' only", "new", {"tensor_parallel": 2}),
        ):
            with pytest.raises(error, match=message):
                engine.save(tmp_path / path, **options)
    streamed = engine_of(source, offload="host")
    with pytest.raises(ConfigError, match="`jdsi convert` writes them anew"):
        streamed.save(tmp_path / "new")
    streamed.close()
    assert sorted(map(str, tmp_path.rglob("*"))) == before
    engine_of(source, tensor_parallel=2).save(other, to="hf", overwrite=True)
    check_bits(other, source)


@pytest.fixture(scope="module")
def cuts(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cut")
    for degree in (2, 3):
        convert(folders / TIED, root / str(degree), to="sharded", tensor_parallel=degree)
    return root


def _rank(rank: int, ranks: int = 2) -> str:
    return f"rank-{rank:05}-of-{ranks:05}.safetensors"


def _shorten(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def _take_manifest_of_three(cut: Path, other: Path) -> None:
    shutil.copy(other / "jdsi.json", cut)


def _pass_for_three(cut: Path, other: Path) -> None:
    _take_manifest_of_three(cut, other)
    for rank in (0, 1):
        (cut / _rank(rank)).rename(cut / _rank(rank, 3))
    shutil.copy(cut / _rank(1, 3), cut / _rank(2, 3))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda cut, _: (cut / _rank(1)).unlink(), f"files are missing: {_rank(1)}"),
        (lambda cut, _: _shorten(cut / _rank(1), 0), "0 bytes is too short"),
        (lambda cut, _: _shorten(cut / _rank(1), 300), "truncated"),
        (lambda cut, _: _shorten(cut / _rank(0), 9000), "the file is truncated"),
        (lambda cut, other: shutil.copy(other.parent / "config.json", cut), r"does not fit the model its config"),
        (lambda cut, _: (cut / "config.json").unlink(), r"no config\.json"),
        (_take_manifest_of_three, f"files are missing: {_rank(0, 3)}"),
        (_pass_for_three, "written for another folder"),
    ],
)
def test_damaged_shards_are_named_before_a_device_is_used(
    harm: Callable[[Path, Path], Any],
    message: str,
    folders: Path,
    cuts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(folders / TRANSPOSING / "config.json", cuts)
    cut = Path(shutil.copytree(cuts / "2", tmp_path / "cut"))
    harm(cut, cuts / "3")
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("put on a device"))
    for degrees in ({"tensor_parallel": 2}, {"pipeline_parallel": 2}, {}):
        with pytest.raises(CheckpointError, match=message):
            engine_of(cut, **degrees)


PROCESS = """
import json, sys
from pathlib import Path
import numpy as np
import jdsi

own, port, root, tied, untied = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), *sys.argv[4:]
jdsi.sharding.initialize(f"127.0.0.1:{port}", 2, own)
errors = []

def attempt(path, **options):
    try:
        engine.save(path, **options)
    except jdsi.JdsiError as error:
        errors.append(f"{type(error).__name__}: {error}")

class Interrupted:
    def start(self, total): pass
    def advance(self, count): raise OSError(28, "No space left on device")
    def finish(self): pass

# Neither has a whole layer in process 0; of the first each rank's shares, of the second the last stage is in process 1.
engine = jdsi.init_inference(tied, dtype="float32", tensor_parallel=4)
for to in ("hf", "orbax", "sharded"):
    engine.save(root / f"tensor-{to}", to=to)
attempt(root / "tensor-hf")
attempt(root / f"of{own}")
attempt(root / "full", progress=Interrupted())
engine = jdsi.init_inference(untied, dtype="bfloat16", tensor_parallel=2, pipeline_parallel=2)
engine.save(root / "pipe-hf", to="hf")
engine.save(root / "pipe-streaming", to="streaming")
found = [np.asarray(engine.forward([[3, 4]])).tolist(), errors]
(root / f"{own}.json").write_text(json.dumps(found))
"""


def test_two_processes_save_what_neither_of_them_has(folders: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    models = str(folders / TIED), str(folders / UNTIED)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WITHOUT_TORCH + PROCESS, str(own), port, str(tmp_path), *models],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for own in (0, 1)
    ]
    try:
        output = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert not any(process.returncode for process in running), "\n".join(output)
    (first, errors), (second, others) = (json.loads((tmp_path / f"{own}.json").read_text()) for own in (0, 1))
    assert first == second
    assert [error.partition(":")[0] for error in errors] == ["CheckpointError", "ConfigError", "CheckpointError"]
    assert "tensor-hf: exists" in errors[0]
    assert "path is" in errors[1]
    assert "the disk is full" in errors[2]
    assert others == [
        f"CheckpointError: in process 0, {errors[0]}",
        errors[1],
        f"CheckpointError: in process 0, {errors[2]}",
    ]
    made = {"0.json", "1.json", "tensor-hf", "tensor-orbax", "tensor-sharded", "pipe-hf", "pipe-streaming"}
    assert {path.name for path in tmp_path.iterdir()} == made
    check_bits(tmp_path / "tensor-hf", folders / TIED)
    for name in ("tensor-orbax", "tensor-sharded"):
        convert(tmp_path / name, tmp_path / f"{name}-hf", to="hf")
        check_bits(tmp_path / f"{name}-hf", folders / TIED)
    convert(folders / UNTIED, tmp_path / "narrow", to="hf", dtype="bfloat16")
    convert(tmp_path / "pipe-streaming", tmp_path / "pipe-again", to="hf")
    for name in ("pipe-hf", "pipe-again"):
        found, wanted = ((tmp_path / f / "model.safetensors").read_bytes() for f in (name, "narrow"))
        assert found == wanted
    import orbax.checkpoint.experimental.v1 as ocp

    group = ocp.load(str(tmp_path / "tensor-orbax" / "orbax" / "layers.0"))  # plain Orbax reads it as well
    wanted_layer = parameters(load_model(folders / TIED, dtype="float32"))
    assert all(np.asarray(array).tobytes() == np.asarray(wanted_layer[name]).tobytes() for name, array in group.items())
