"""Saving from a mesh, and folders cut beforehand: round trips over degrees and layouts, and every kind of damage."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from jdsi.cli.app import app
from jdsi.converters import (
    ShardedCheckpoint,
    ShardedParameters,
    convert,
    from_arrays,
    load_model,
    load_sharded,
    open_checkpoint,
    open_model,
)
from jdsi.converters.block_store import BlockStore
from jdsi.converters.config import load_family, read_config
from jdsi.converters.huggingface import write_huggingface
from jdsi.converters.orbax import write_orbax
from jdsi.converters.safetensors_file import read_header
from jdsi.converters.sharded import rank_file
from jdsi.converters.streaming import write_streaming
from jdsi.errors import CheckpointError, ConfigError
from jdsi.models import parameters, splits_of
from jdsi.sharding import make_mesh, stage_meshes
from sharded import CONFIGS, counted_reads, save, share_of

FAMILIES = ["llama-mqa", "llama-gqa", "phi3", "gpt2", "bloom", "falcon-gqa", "bert"]


def mesh_of(tensor: int) -> jax.sharding.Mesh:
    return stage_meshes(make_mesh(tensor=tensor))[0]


def load(folder: Path, tensor: int) -> dict[str, jax.Array]:
    return load_sharded(open_model(folder), mesh_of(tensor), dtype="float32")


def check_equal(got: dict[str, jax.Array], wanted: dict[str, jax.Array]) -> None:
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
        assert got[name].sharding == array.sharding


def check_same_tensors(folder: Path, original: Path) -> None:
    before, after = load_file(original / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() >= after.keys()
    for name, value in after.items():
        assert value.dtype == before[name].dtype
        np.testing.assert_array_equal(value, before[name], err_msg=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trips_over_degrees_and_layouts(name: str, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    save(name, hf)
    plain = parameters(load_model(hf, dtype="float32"))
    wanted = {tensor: load(hf, tensor) for tensor in (1, 2, 3, 4)}
    for degree in (2, 3):
        folder = tmp_path / f"cut{degree}"
        report = convert(hf, folder, to="sharded", tensor_parallel=degree)
        assert report.bytes >= sum(array.nbytes for array in plain.values())
        for tensor, arrays in wanted.items():
            check_equal(load(folder, tensor), arrays)
        check_equal(parameters(load_model(folder, dtype="float32")), plain)
        convert(folder, tmp_path / f"back{degree}", to="hf")
        check_same_tensors(tmp_path / f"back{degree}", hf)
    convert(tmp_path / "cut2", tmp_path / "cut2to3", to="sharded", tensor_parallel=3)
    for rank in range(3):
        again, directly = (load_file(tmp_path / f / rank_file(rank, 3)) for f in ("cut2to3", "cut3"))
        assert again.keys() == directly.keys()
        assert all(np.array_equal(again[key], directly[key]) for key in directly)
    convert(tmp_path / "cut3", tmp_path / "orbax", to="orbax")
    check_equal(parameters(load_model(tmp_path / "orbax", dtype="float32")), plain)


def test_the_files_hold_the_shares(tmp_path: Path) -> None:
    save("llama-mqa", tmp_path / "hf")
    report = convert(tmp_path / "hf", tmp_path / "cut", to="sharded", tensor_parallel=4, dtype="bfloat16")
    ranks = [rank_file(rank, 4) for rank in range(4)]
    assert set(report.files) == {"config.json", "jdsi.json", "replicated.safetensors", *ranks, "generation_config.json"}
    plain, spec = parameters(load_model(tmp_path / "hf", dtype="bfloat16")), load_family(tmp_path / "hf")[1]
    same = load_file(tmp_path / "cut" / "replicated.safetensors")
    stored = sum(array.nbytes for array in same.values())
    for rank, file in enumerate(ranks):
        found = load_file(tmp_path / "cut" / file)
        assert found.keys() | same.keys() == plain.keys()
        assert not found.keys() & same.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, share_of(spec, name, np.asarray(plain[name]), 4, rank))
        stored += sum(array.nbytes for array in found.values())
    assert report.bytes == stored


def test_the_degree_it_was_cut_for_is_one_read_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama-gqa", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "cut", to="sharded", tensor_parallel=2)
    calls = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: calls.append(arguments) or real(*arguments))
    arrays = load(tmp_path / "cut", 2)
    assert len(calls) == sum(1 if array.is_fully_replicated else 2 for array in arrays.values())
    with counted_reads(monkeypatch) as count:
        arrays = load(tmp_path / "cut", 4)  # gathers, and still reads no more than the shares
        assert count() < 1.3 * sum(array.nbytes for array in arrays.values())


WRITERS: dict[str, Callable[..., None]] = {"orbax": write_orbax, "streaming": write_streaming}


# Hugging Face's is the layout that depends on the family; in the others one with padded heads, and one rearranged.
@pytest.mark.parametrize(
    ("name", "to"),
    [
        pytest.param(name, to, marks=() if to == "hf" or name in ("llama-mqa", "bloom") else pytest.mark.slow)
        for to in ("orbax", "streaming", "hf")
        for name in FAMILIES
    ],
)
def test_a_model_on_a_mesh_is_saved_and_restored_on_another(name: str, to: str, tmp_path: Path) -> None:
    hf, out = tmp_path / "hf", tmp_path / "out"
    save(name, hf)
    out.mkdir()
    family, spec = load_family(hf)
    source = ShardedParameters(load(hf, 3), spec, 3)
    if to == "hf":
        write_huggingface(
            source,
            family.weight_map(spec),
            read_config(hf),
            out,
            dtype=None,
            max_shard_size=10**9,
            watch=lambda *_: None,
        )
        check_same_tensors(out, hf)
    else:
        WRITERS[to](source, spec, out, dtype=None, watch=lambda *_: None)
        shutil.copyfile(hf / "config.json", out / "config.json")
    for tensor in (1, 2, 4):
        check_equal(load(out, tensor), load(hf, tensor))


def test_parameters_of_a_mesh(tmp_path: Path) -> None:
    save("gpt2", tmp_path)
    model = load_model(tmp_path, dtype="float32")
    plain, spec = parameters(model), model.spec
    arrays = from_arrays(plain, spec, mesh_of(3))
    source = ShardedParameters(arrays, spec, 3)
    seen = []
    for name, array in plain.items():
        got = source.read(name, np.dtype("float16"), lambda _, block: seen.append(block.nbytes))
        np.testing.assert_array_equal(got, np.asarray(array).astype(np.float16))
    assert sum(seen) == sum(array.size * 2 for array in plain.values())
    with pytest.raises(ValueError, match=r"embedding\.tokens\.weight is .* wanted are shards"):
        ShardedParameters(arrays, spec, 2)
    with pytest.raises(ValueError, match=r"embedding\.tokens\.weight is .* wanted are shards"):
        ShardedParameters({name: jax.numpy.asarray(np.asarray(array)) for name, array in arrays.items()}, spec, 3)
    with pytest.raises(ValueError, match="not parameters of this gpt2: stray"):
        ShardedParameters({"stray": arrays["norm.weight"]}, spec, 3)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(sorted(FAMILIES)))
def test_from_any_mesh_to_any_share(
    tmp_path_factory: pytest.TempPathFactory, before: int, after: int, name: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"any-{name}"
    if not folder.exists():
        save(name, folder)
    model = load_model(folder, dtype="float32")
    source = ShardedParameters(from_arrays(parameters(model), model.spec, mesh_of(before)), model.spec, before)
    for parameter, array in parameters(model).items():
        split = splits_of(model.spec, after)[parameter]
        for rank in range(after if split else 0):
            assert split is not None
            got = source.read_share(parameter, np.dtype("float32"), split, rank, lambda *_: None)
            np.testing.assert_array_equal(got, share_of(model.spec, parameter, np.asarray(array), after, rank))


@pytest.fixture(scope="module")
def _cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cut")
    save("llama-gqa", root / "hf")
    convert(root / "hf", root / "cut", to="sharded", tensor_parallel=2)
    return root / "cut"


@pytest.fixture
def cut(_cut: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_cut, tmp_path / "cut"))


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "jdsi.json").read_text())
    change(manifest)
    (folder / "jdsi.json").write_text(json.dumps(manifest))


def _qkv(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["parameters"]["layers.0.attention.qkv.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=9), "version 9"),
        (lambda m: m.update(complete=False), "did not finish"),
        (lambda m: m.pop("parameters"), "damaged: KeyError"),
        (lambda m: m.update(tensor_parallel="2"), "damaged"),
        (lambda m: m.update(tensor_parallel=3), "no split of"),
        (lambda m: _qkv(m).update(dtype="float31"), "damaged"),
        (lambda m: _qkv(m).update(dtype="bfloat16"), r"disagrees about .* layers\.0\.attention\.qkv\.weight"),
        (lambda m: _qkv(m).update(shape=[-1, 24]), "damaged"),
        (lambda m: _qkv(m).update(split=None), r"disagrees about .* layers\.0\.attention\.qkv\.weight"),
        (lambda m: _qkv(m)["split"].update(dim=2), "damaged: IndexError"),
        (lambda m: _qkv(m)["split"].update(size=63), "no split of"),
        (lambda m: _qkv(m)["split"].update(size=65), r"disagrees about .* layers\.0\.attention\.qkv\.weight"),
        (lambda m: _qkv(m)["split"]["runs"][1].pop(), "no rank holds entry 112"),
        (lambda m: _qkv(m)["split"]["runs"][1][0].append(1), "damaged: TypeError"),
        (lambda m: _qkv(m)["split"]["runs"][1][0].__setitem__(1, 10**9), "no split of"),
        (lambda m: _qkv(m)["split"]["runs"][1][1].__setitem__(2, 0), "no split of"),
        (lambda m: m["parameters"].pop("norm.weight"), r"disagrees about .* norm\.weight"),
    ],
)
def test_bad_manifests(cut: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    assert isinstance(open_checkpoint(cut), ShardedCheckpoint)
    _edit(cut, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(cut)


@pytest.mark.parametrize("file", [rank_file(1, 2), "replicated.safetensors"])
def test_missing_and_damaged_files(cut: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (cut / file).read_bytes()
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("put on a device"))
    (cut / file).unlink()
    with pytest.raises(CheckpointError, match=f"files are missing: {file}"):
        load(cut, 2)
    (cut / file).write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"{file}: .*truncated"):
        load(cut, 2)
    (cut / file).write_bytes(whole)
    tensors = load_file(cut / file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, cut / file, read_header(cut / file)[1])
    with pytest.raises(CheckpointError, match=f"{file}: jdsi.json disagrees"):
        load(cut, 2)


def test_an_orbax_folder_without_one_of_its_groups(cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(cut, tmp_path / "orbax", to="orbax")
    shutil.rmtree(tmp_path / "orbax" / "orbax" / "layers.1")
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("put on a device"))
    with pytest.raises(CheckpointError, match=r"groups are missing below orbax/: layers\.1"):
        load(tmp_path / "orbax", 2)


def test_files_that_were_swapped_or_come_from_another_folder(cut: Path, tmp_path: Path) -> None:
    first, second = cut / rank_file(0, 2), cut / rank_file(1, 2)
    aside = tmp_path / "aside"
    shutil.move(first, aside)
    shutil.copy(second, first)
    with pytest.raises(CheckpointError, match=r"rank-00000.*under another name"):
        open_checkpoint(cut)
    shutil.copy(aside, first)
    open_checkpoint(cut)
    manifest = json.loads((cut / "jdsi.json").read_text())
    (cut / "jdsi.json").write_text(json.dumps(manifest | {"identity": "another"}))
    with pytest.raises(CheckpointError, match="written for another folder"):
        open_checkpoint(cut)


def test_a_folder_that_does_not_fit_its_config(cut: Path) -> None:
    config = json.loads((cut / "config.json").read_text())
    (cut / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"missing: layers\.2\."):
        load(cut, 2)


def test_a_folder_without_its_manifest_does_not_open(cut: Path) -> None:
    (cut / "jdsi.json").unlink()
    with pytest.raises(CheckpointError, match="is in both"):
        load(cut, 2)


def test_it_is_streamed_at_its_own_degree_only(cut: Path) -> None:
    with pytest.raises(CheckpointError, match=r"can be streamed only with that, not with 1; .*--to streaming"):
        BlockStore.open(cut)
    assert BlockStore.open(cut, tensor_parallel=2).blocks["layers.0"].ranks == 2


def test_a_degree_of_one_and_options_that_contradict(tmp_path: Path) -> None:
    save("llama-gqa", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "one", to="sharded", tensor_parallel=1)
    assert not list((tmp_path / "one").glob("rank-*"))
    check_equal(load(tmp_path / "one", 2), load(tmp_path / "hf", 2))
    for degree in (None, 0, True, "2"):
        with pytest.raises(ConfigError, match="needs tensor_parallel, an integer of at least 1"):
            convert(tmp_path / "hf", tmp_path / "out", to="sharded", tensor_parallel=degree)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="for to='sharded' only, not for to='orbax'"):
        convert(tmp_path / "hf", tmp_path / "out", to="orbax", tensor_parallel=2)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path) -> None:
    save("llama-gqa", tmp_path / "hf")
    options = ["--to", "sharded", "--tensor-parallel", "2", "--json"]
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "hf"), str(tmp_path / "cut"), *options])
    assert done.exit_code == 0, done.output
    assert rank_file(1, 2) in json.loads(done.stdout)["files"]
    opened = open_checkpoint(tmp_path / "cut")
    assert isinstance(opened, ShardedCheckpoint)
    assert opened.ranks == 2


def test_every_config_is_cut(tmp_path: Path) -> None:
    for name in CONFIGS.keys() - set(FAMILIES):
        save(name, tmp_path / name)
        convert(tmp_path / name, tmp_path / f"{name}-cut", to="sharded", tensor_parallel=5)
        check_equal(load(tmp_path / f"{name}-cut", 5), load(tmp_path / name, 5))
