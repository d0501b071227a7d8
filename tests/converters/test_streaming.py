"""The folder laid out for streaming: round trips, every kind of damage, verification."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints import save_llama
from jdsi.converters import convert, load_model, open_checkpoint
from jdsi.converters.block_store import FIELD_ALIGNMENT, BlockStore
from jdsi.converters.direct_io import PAGE, DirectReader, PageBuffer
from jdsi.converters.streaming import StreamingCheckpoint
from jdsi.errors import CheckpointError
from jdsi.models import parameters


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streaming") / "llama"
    save_llama(folder)
    return folder


@pytest.fixture
def store(llama: Path, tmp_path: Path) -> Path:
    convert(llama, tmp_path / "store", to="streaming")
    return tmp_path / "store"


def test_round_trip_is_exact(llama: Path, store: Path, tmp_path: Path) -> None:
    convert(store, tmp_path / "back", to="hf")
    before, after = load_file(llama / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name])


def test_types_may_differ_and_lie_together(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "mixed")
    tensors = load_file(llama / "model.safetensors")
    for name in tensors:
        if "norm" not in name:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    save_file(tensors, tmp_path / "mixed" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "mixed", tmp_path / "store", to="streaming")
    parameters = json.loads((tmp_path / "store" / "jdsi.json").read_text())["groups"]["layers.0"]["parameters"]
    types = [entry["dtype"] for entry in sorted(parameters.values(), key=lambda entry: entry["offset"])]
    assert types == ["bfloat16"] * 4 + ["float32"] * 2
    StreamingCheckpoint(tmp_path / "store").verify()
    convert(tmp_path / "store", tmp_path / "back", to="hf")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert {name: (t.dtype, t.tobytes()) for name, t in tensors.items()} == {
        name: (t.dtype, t.tobytes()) for name, t in after.items()
    }


@pytest.mark.parametrize("layout", ["store", "llama"])
def test_blocks_hold_the_parameters(layout: str, llama: Path, store: Path) -> None:
    expected = parameters(load_model(llama, dtype="float32"))
    blocks = BlockStore.open(store if layout == "store" else llama)
    order = list(blocks.blocks)  # of a pass, and of the file
    assert order == ["embedding", *blocks.layers, "norm", "head"]
    assert layout == "llama" or order == list(StreamingCheckpoint(store).groups)
    reader, seen = DirectReader(), set()
    for block in blocks.blocks.values():
        memory = PageBuffer(block.nbytes).bytes
        memory[:] = 255
        reader.read(block.segments, memory)
        views = block.form.views(memory)
        assert all(array.ctypes.data % FIELD_ALIGNMENT == 0 for array in views.values())
        for name, array in block.form.make(views, "float32").items():
            full = f"{block.name}.{name}" if block.name.startswith("layers.") else name
            np.testing.assert_array_equal(array, expected[full], err_msg=full)
            seen.add(full)
    reader.close()
    assert seen == expected.keys()
    if layout == "store":
        assert all(block.segments[0].offset % PAGE == 0 for block in blocks.blocks.values())


def test_verify_finds_one_flipped_bit(store: Path) -> None:
    checkpoint = open_checkpoint(store)
    assert isinstance(checkpoint, StreamingCheckpoint)
    checkpoint.verify()
    group = checkpoint.groups["layers.1"]
    with open(checkpoint.file, "r+b") as file:
        file.seek(group.offset + group.nbytes - 1)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CheckpointError, match=r"the checksum is wrong of layers\.1;"):
        checkpoint.verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=9), "version 9"),
        (lambda m: m.update(format="jdsi-else"), "format 'jdsi-else'"),
        (lambda m: m.update(complete=False), "did not finish"),
        (lambda m: m["groups"].pop("layers.0"), "missing: layers.0"),
        (lambda m: m["groups"]["norm"].pop("crc32"), "damaged"),
        (lambda m: m["groups"]["norm"].update(offset=-PAGE), "damaged"),
        (lambda m: m["groups"]["norm"].update(offset=1), "damaged"),
        (lambda m: m["groups"]["norm"].update(bytes=1), "damaged"),
        (lambda m: m["groups"]["norm"].update(offset=1 << 40), "are needed"),
        (lambda m: m["groups"]["norm"]["parameters"]["norm.weight"].update(shape=[-1]), "damaged"),
        (lambda m: m["groups"]["norm"]["parameters"]["norm.weight"].update(shape=[3]), "of another shape: norm.weight"),
        (lambda m: m["groups"]["norm"]["parameters"]["norm.weight"].update(dtype="float3"), "damaged"),
    ],
)
def test_damaged_manifests_are_named(store: Path, change: object, message: str) -> None:
    manifest = json.loads((store / "jdsi.json").read_text())
    change(manifest)
    (store / "jdsi.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        BlockStore.open(store)


def test_a_missing_or_short_file_is_named(store: Path) -> None:
    file = store / "weights.bin"
    file.write_bytes(file.read_bytes()[:-PAGE])
    with pytest.raises(CheckpointError, match=r"weights\.bin has [\d,]+ bytes, [\d,]+ are needed"):
        BlockStore.open(store)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"weights\.bin is missing"):
        BlockStore.open(store)


def test_other_layouts_are_told_how_to_stream(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "orbax", to="orbax")
    with pytest.raises(CheckpointError, match=r"jdsi convert .* DST --to streaming` makes the latter of this one$"):
        BlockStore.open(tmp_path / "orbax")
