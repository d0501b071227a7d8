"""Opening checkpoints: every way a folder can be wrong has its own message."""

import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import jdsi
from jdsi.converters import Checkpoint, OrbaxCheckpoint, load_model, load_spec, open_checkpoint, open_model
from jdsi.errors import CheckpointError, ConfigError, JdsiWarning
from jdsi.models import parameters


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_opens_every_layout(hf_folder: Path, sharded_folder: Path, orbax_folder: Path) -> None:
    single, sharded, ours = map(open_checkpoint, (hf_folder, sharded_folder, orbax_folder))
    assert isinstance(single, Checkpoint)
    assert isinstance(sharded, Checkpoint)
    assert isinstance(ours, OrbaxCheckpoint)
    assert len(sharded.files) > 1
    assert single.tensors.keys() == sharded.tensors.keys()
    assert single.nbytes == sharded.nbytes == ours.nbytes
    assert open_model(hf_folder).config.hidden_size == 40


@pytest.mark.parametrize("path", ["/absent/folder", "./absent", "a/b/c", "../absent"])
def test_a_path_that_does_not_exist(path: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(path)


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("the network is unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match=r"some/model: no such folder here.*the network is unreachable"):
        open_checkpoint("some/model")


def test_a_hub_id_downloads_weights_once(monkeypatch: pytest.MonkeyPatch, hf_folder: Path) -> None:
    import huggingface_hub

    asked: list[tuple[str, list[str]]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(hf_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_spec("some/model").width == 40
    assert isinstance(open_checkpoint("some/model"), Checkpoint)
    assert {name for name, _ in asked} == {"some/model"}
    assert "additional_chat_templates/*.jinja" in asked[0][1]
    assert not any("bin" in pattern for _, patterns in asked for pattern in patterns if "sentencepiece" not in pattern)
    (hf_folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        open_checkpoint("some/model")
    assert asked[-1][1][0] == "pytorch_model*.bin"


def test_a_hub_id_whose_config_names_its_weights(monkeypatch: pytest.MonkeyPatch, sharded_folder: Path) -> None:
    import huggingface_hub

    asked: list[str] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(sharded_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    index, table = index_of(sharded_folder)
    index.rename(sharded_folder / "chosen.json")
    edit_json(sharded_folder / "config.json", transformers_weights="chosen.json")
    assert isinstance(open_checkpoint("some/model"), Checkpoint)
    assert asked[-1 - len(set(table.values())) :] == ["chosen.json", *sorted(set(table.values()))]


def test_folders_without_the_right_files(tmp_path: Path, hf_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="the folder is empty"):
        open_checkpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="a file; give the folder"):
        open_checkpoint(hf_folder / "model.safetensors")
    (hf_folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        open_checkpoint(hf_folder)
    (hf_folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(hf_folder)


def test_what_is_mistaken_for_a_checkpoint(hf_folder: Path, tmp_path: Path) -> None:
    """Each is named, with what to do: nothing is left but one line."""
    run, gguf, adapter = tmp_path / "run", tmp_path / "gguf", tmp_path / "adapter"
    for name in ("checkpoint-100", "checkpoint-50"):
        shutil.copytree(hf_folder, run / name)
    gguf.mkdir()
    (gguf / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    told = {
        run: "holds no model itself; give one of the folders in it that do: checkpoint-100, checkpoint-50",
        gguf: "holds a GGUF file, which cannot be read; give the folder of the model in Hugging Face format",
        gguf / "model.Q4_K_M.gguf": "a GGUF file, which cannot be read",
        adapter: "an adapter .PEFT. without the model itself; merge it .* merge_and_unload",
    }
    for path, message in told.items():
        with pytest.raises(CheckpointError, match=f"^{path}: {message}") as caught:
            open_checkpoint(path)
        assert "\n" not in str(caught.value)
        with pytest.raises(CheckpointError, match=message):
            load_spec(path)
    shutil.copy(hf_folder / "config.json", adapter)  # as some tools leave it
    with pytest.raises(CheckpointError, match="an adapter"):
        open_checkpoint(adapter)


def test_the_spec_of_a_folder_whose_weights_did_not_come(sharded_folder: Path, hf_folder: Path) -> None:
    wanted = load_spec(hf_folder)
    shards = sorted(sharded_folder.glob("model-*.safetensors"))
    for file in shards:
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.warns(JdsiWarning, match=r"config\.json alone says what the model is: .*a git-lfs pointer"):
        assert load_spec(sharded_folder) == wanted
    for file in shards:
        file.unlink()
    with pytest.warns(JdsiWarning, match=r"config\.json alone says what the model is: .*that are not there"):
        assert load_spec(sharded_folder) == wanted
    with pytest.raises(CheckpointError, match="that are not there"):
        open_model(sharded_folder)


def test_an_adapter_beside_the_model_is_not_left_without_a_word(hf_folder: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (hf_folder / name).write_bytes(b"{}")
        with pytest.warns(JdsiWarning, match=r"holds an adapter \(PEFT\) beside the model, which is read without it"):
            load_model(hf_folder)
        (hf_folder / name).unlink()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json"])
def test_a_git_lfs_pointer(hf_folder: Path, name: str) -> None:
    if name == "pytorch_model.bin":
        (hf_folder / "model.safetensors").unlink()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (hf_folder / name).write_text(pointer)
    with pytest.raises(CheckpointError, match=rf"{name}: a git-lfs pointer in place of the file; `git lfs pull`"):
        jdsi.init_inference(hf_folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON list"),
        ("{}", "no 'model_type'"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', "quantised with 'gptq'"),
    ],
)
def test_bad_configs(hf_folder: Path, content: str, message: str) -> None:
    (hf_folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(hf_folder)


def test_a_config_without_a_family_is_told_before_the_tokenizer(hf_folder: Path) -> None:
    (hf_folder / "config.json").write_text("{}")
    (hf_folder / "tokenizer.json").unlink()
    (hf_folder / "vocab.txt").write_text("[UNK]\n[CLS]\n")
    with pytest.raises(CheckpointError, match=r"config\.json: no 'model_type'"):
        jdsi.init_inference(hf_folder)


def test_a_tokenizer_path_that_does_not_exist(hf_folder: Path) -> None:
    (hf_folder / "tokenizer.json").unlink()
    for path in ("/nowhere/tokenizer", "./nowhere", hf_folder / "absent"):
        with pytest.raises(CheckpointError, match=rf"^{re.escape(str(Path(path)))}: no such folder$"):
            jdsi.init_inference(hf_folder, tokenizer=path)
    with pytest.raises(CheckpointError, match=r"config\.json: a file; give the folder|has no tokenizer"):
        jdsi.init_inference(hf_folder, tokenizer=hf_folder / "config.json")


def test_values_that_describe_no_model(hf_folder: Path) -> None:
    for change, message in {
        "num_attention_heads": (0, "transformers refuses this llama: integer modulo by zero"),
        "attention_dropout": (12, "attention_dropout=12 must be from 0 to 1"),
        "architectures": ([48], "its values describe no llama model"),
        "num_key_value_heads": (3, "is not a multiple of"),
        "num_hidden_layers": (2**31, "num_hidden_layers=2147483648 must be from 0 to 10000"),
    }.items():
        original = (hf_folder / "config.json").read_text()
        edit_json(hf_folder / "config.json", **{change: message[0]})
        with pytest.raises((ConfigError, CheckpointError), match=rf"config\.json: .*{message[1]}"):
            load_model(hf_folder)
        (hf_folder / "config.json").write_text(original)


def test_unknown_families_and_values(hf_folder: Path) -> None:
    edit_json(hf_folder / "config.json", model_type="lama")
    with pytest.raises(ConfigError, match=r"config\.json: unknown family 'lama' \(did you mean 'llama'\?\); known: .*"):
        load_model(hf_folder)
    edit_json(hf_folder / "config.json", model_type="llama", hidden_size="wide")
    with pytest.raises(CheckpointError, match="transformers refuses this llama"):
        load_model(hf_folder)


def index_of(folder: Path) -> tuple[Path, dict[str, str]]:
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())["weight_map"]


def test_an_index_that_names_absent_files(sharded_folder: Path) -> None:
    path, table = index_of(sharded_folder)
    gone = sorted(set(table.values()))[1]
    (sharded_folder / gone).unlink()
    with pytest.raises(CheckpointError, match=f"names 1 files that are not there: {gone}") as caught:
        open_checkpoint(sharded_folder)
    assert str(path) in str(caught.value)


def test_an_index_that_puts_tensors_in_the_wrong_file(sharded_folder: Path) -> None:
    path, table = index_of(sharded_folder)
    name = "model.norm.weight"
    wrong = next(file for file in table.values() if file != table[name])
    edit_json(path, weight_map=table | {name: wrong, "made.up": wrong})
    with pytest.raises(CheckpointError, match=f"{name} in {wrong}, made.up in {wrong}"):
        open_checkpoint(sharded_folder)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "a\\b"])
def test_an_index_that_points_elsewhere(sharded_folder: Path, file: str) -> None:
    path, table = index_of(sharded_folder)
    edit_json(path, weight_map=table | {"model.norm.weight": file})
    with pytest.raises(CheckpointError, match="must be files beside the index"):
        open_checkpoint(sharded_folder)


@pytest.mark.parametrize("table", [None, [], {}, {"a": 3}])
def test_an_index_without_a_table(sharded_folder: Path, table: Any) -> None:
    edit_json(index_of(sharded_folder)[0], weight_map=table)
    with pytest.raises(CheckpointError, match="'weight_map' must be an object"):
        open_checkpoint(sharded_folder)


def test_shards_that_lost_their_index(sharded_folder: Path, hf_folder: Path) -> None:
    index_of(sharded_folder)[0].unlink()
    found = open_checkpoint(sharded_folder)
    assert isinstance(found, Checkpoint)
    (sharded_folder / "zz.safetensors").write_bytes((hf_folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"is in both .* and zz\.safetensors"):
        open_checkpoint(sharded_folder)


def test_torch_files(hf_folder: Path, sharded_folder: Path) -> None:
    wanted = parameters(load_model(hf_folder))
    state = load_file(hf_folder / "model.safetensors")
    (hf_folder / "model.safetensors").unlink()
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(state, hf_folder / "pytorch_model.bin", **options)
        got = parameters(load_model(hf_folder))
        assert all(np.array_equal(got[name], wanted[name]) for name in wanted)
    narrow = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    torch.save(narrow, hf_folder / "pytorch_model.bin")
    norm = parameters(load_model(hf_folder))["norm.weight"]
    np.testing.assert_array_equal(norm, narrow["model.norm.weight"].float().numpy())


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mknod, (str(self.path),)


@pytest.mark.parametrize("layout", ["raw", "zip"])
def test_a_malicious_pickle_runs_nothing(hf_folder: Path, tmp_path: Path, layout: str) -> None:
    (hf_folder / "model.safetensors").unlink()
    file, trace = hf_folder / "pytorch_model.bin", tmp_path / "executed"
    if layout == "raw":
        file.write_bytes(pickle.dumps(_Bomb(trace)))
    else:
        torch.save({"model.norm.weight": _Bomb(trace)}, file)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: (refused|not a readable)"):
        open_checkpoint(hf_folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [([1], "holds a list"), ({"a": {"b": 1}, "step": 3}, r"'a' \(dict\), 'step' \(int\)"), (b"junk", "bin: ")],
)
def test_torch_files_of_something_else(hf_folder: Path, content: Any, message: str) -> None:
    (hf_folder / "model.safetensors").unlink()
    file = hf_folder / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(hf_folder)


def test_torch_files_without_torch(hf_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (hf_folder / "model.safetensors").rename(hf_folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"pip install 'jdsi\[torch\]'"):
        open_checkpoint(hf_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"format": "other"}, "format 'other'"),
        ({"complete": False}, "did not finish"),
        ({"groups": 3}, "damaged"),
        ({"groups": {"norm": {"norm.weight": {"shape": [40]}}}}, "damaged"),
        ({"groups": {"norm": {"norm.weight": {"shape": [41], "dtype": "float32"}}}}, "of another shape: norm.weight"),
    ],
)
def test_bad_manifests(orbax_folder: Path, change: dict[str, Any], message: str) -> None:
    edit_json(orbax_folder / "jdsi.json", **change)
    with pytest.raises(CheckpointError, match=message):
        load_model(orbax_folder)


def test_a_damaged_orbax_folder(orbax_folder: Path) -> None:
    for file in (orbax_folder / "orbax" / "layers.1").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"'layers\.1\..*cannot be read"):
        load_model(orbax_folder)


def test_an_unfinished_conversion_does_not_open(hf_folder: Path) -> None:
    partial = hf_folder.rename(hf_folder.with_name("out.partial-0123abcd"))
    with pytest.raises(CheckpointError, match="did not finish"):
        open_checkpoint(partial)
