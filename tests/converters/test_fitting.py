"""What model a folder holds, where its config and its tensors disagree: as transformers has it, for every family."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import jdsi
import zoo
from jdsi.converters import convert, load_model, load_spec, open_model, random_checkpoint
from jdsi.converters.fitting import equal
from jdsi.errors import CheckpointError, ConfigError, JdsiWarning
from jdsi.models import parameters
from jdsi.models.families import FAMILIES


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def tied_names(name: str, folder: Path) -> tuple[tuple[str, str], ...]:
    table = FAMILIES[name].weight_map(load_spec(folder / "config.json"))
    return table.tied


def arrays(folder: Path, **options: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in parameters(load_model(folder, **options)).items()}


def assert_same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def theirs(name: str, folder: Path) -> dict[str, np.ndarray]:
    """What transformers ends up with, by our names."""
    model = zoo.auto_class(name).from_pretrained(folder)
    head = model.get_output_embeddings()
    found = {"embedding.tokens.weight": model.get_input_embeddings().weight, "head.weight": head.weight}
    if head.bias is not None:
        found["head.bias"] = head.bias
    return {key: value.detach().numpy() for key, value in found.items()}


@pytest.mark.parity
@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_tied_tensors(name: str, tmp_path: Path) -> None:
    """Both stored and equal, both and different, the copy alone, different biases."""
    folder = tmp_path / "model"
    zoo.save(name, folder, tie_word_embeddings=True)
    pairs, plain = tied_names(name, folder), arrays(folder)
    projection, embedding = pairs[0]

    rewrite(folder, lambda t: t.update({copy: t[original] for copy, original in pairs}))
    assert_same(arrays(folder), plain)
    rewrite(folder, lambda t: [t.pop(original) for _, original in pairs])  # type: ignore[arg-type, func-returns-value]
    assert_same(arrays(folder), plain)
    rewrite(folder, lambda t: t.update({embedding: t[projection], projection: t[projection][::-1].copy()}))
    for copy, original in pairs[1:]:
        rewrite(folder, lambda t, c=copy, o=original: t.update({o: t[c], c: t[c] + 1}))
    with pytest.warns(JdsiWarning, match="they are not tied"):
        untied = arrays(folder)
    right = theirs(name, folder)
    np.testing.assert_array_equal(right["head.weight"], right["embedding.tokens.weight"][::-1])
    assert {key: untied[key].tolist() for key in right} == {key: value.tolist() for key, value in right.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JdsiWarning)
        convert(folder, tmp_path / "orbax", to="orbax")
        convert(folder, tmp_path / "hf", to="hf")
        assert load_spec(folder) == load_spec(tmp_path / "orbax") == load_spec(tmp_path / "hf")
    # What is written says what it is: nothing is left to be found out, or warned of.
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is False
    assert json.loads((tmp_path / "orbax" / "config.json").read_text())["tie_word_embeddings"] is False
    assert_same(arrays(tmp_path / "orbax"), untied)
    assert_same(arrays(tmp_path / "hf"), untied)
    again = theirs(name, tmp_path / "hf")
    assert all(np.array_equal(again[key], right[key]) for key in right)


@pytest.mark.parity
def test_biases_alone_that_differ(tmp_path: Path) -> None:
    zoo.save("bert", tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lambda t: t.update({"cls.predictions.decoder.bias": t["cls.predictions.bias"] + 1}))
    with pytest.warns(JdsiWarning, match="not tied, and the former is used"):
        found = arrays(tmp_path)
    assert "head.weight" not in found
    np.testing.assert_array_equal(found["head.bias"], theirs("bert", tmp_path)["head.bias"])


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_tensors_that_are_not_used_are_named(name: str, tmp_path: Path) -> None:
    zoo.save(name, tmp_path)
    plain = arrays(tmp_path)
    stray = {"v_head.summary.weight": (1, 3), "score.weight": (2, 3), "causal_mask": (4, 4), "layers.0.bias": (3,)}
    rewrite(tmp_path, lambda t: t.update({key: np.ones(shape, np.float32) for key, shape in stray.items()}))
    with pytest.warns(JdsiWarning) as caught:
        assert_same(arrays(tmp_path), plain)
    assert [str(w.message) for w in caught] == [f"{tmp_path}: not used by this model: {', '.join(sorted(stray))}"]
    with pytest.raises(CheckpointError, match="4 not known to this family"):
        load_model(tmp_path, strict=True)


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_two_sets_of_weights(name: str, tmp_path: Path) -> None:
    """A newer whole file beside older shards and their index; the index alone, stale; a .bin of yesterday."""
    new, old = tmp_path / "new", tmp_path / "old"
    zoo.save(name, new)
    wanted = arrays(new)
    config = zoo.transformers.AutoConfig.from_pretrained(new)
    random_checkpoint(old, config, dtype="float32", max_shard_size="60KB", seed=1)
    for file in old.glob("model*"):
        (new / file.name).write_bytes(file.read_bytes())
    with pytest.warns(JdsiWarning, match=r"two sets of weights; model\.safetensors is read, and not model-00001-of-"):
        assert_same(arrays(new), wanted)
    for file in new.glob("model-*"):
        file.unlink()
    assert_same(arrays(new), wanted)
    torch.save({"x": torch.zeros(1)}, new / "pytorch_model.bin")
    with pytest.warns(JdsiWarning, match=r"and not pytorch_model\.bin"):
        assert_same(arrays(new), wanted)


def test_an_index_that_counts_the_whole_file_among_its_shards(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path)
    wanted = arrays(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    half = dict(list(tensors.items())[::2])
    rest = {key: value for key, value in tensors.items() if key not in half}
    save_file(half, tmp_path / "model.safetensors", {"format": "pt"})
    save_file(rest, tmp_path / "model-rest.safetensors", {"format": "pt"})
    table = dict.fromkeys(half, "model.safetensors") | dict.fromkeys(rest, "model-rest.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    assert_same(arrays(tmp_path), wanted)


def test_the_file_that_a_config_names(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    zoo.save("gpt2", folder)
    wanted = arrays(folder)
    (folder / "model.safetensors").rename(folder / "chosen.safetensors")
    save_file({"x": np.zeros(1, np.float32)}, folder / "another.safetensors")
    edit(folder, transformers_weights="chosen.safetensors")
    assert_same(arrays(folder), wanted)
    for layout in ("hf", "orbax"):  # which have names of their own
        convert(folder, tmp_path / "made" / layout, to=layout)
        assert_same(arrays(tmp_path / "made" / layout), wanted)
    convert(tmp_path / "made" / "orbax", tmp_path / "made" / "again", to="hf")
    for made in ("hf", "again"):
        zoo.auto_class("gpt2").from_pretrained(tmp_path / "made" / made)
        assert_same(arrays(tmp_path / "made" / made), wanted)
    for name in ("absent.safetensors", "../chosen.safetensors"):
        edit(folder, transformers_weights=name)
        with pytest.raises(CheckpointError, match="transformers_weights, which is no file beside it"):
            load_model(folder)


def test_weights_from_another_place(tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    zoo.save("llama", model)
    random_checkpoint(other, zoo.transformers.AutoConfig.from_pretrained(model), dtype="float32", seed=3)
    wanted, own = arrays(other), arrays(model)
    assert not np.array_equal(wanted["head.weight"], own["head.weight"])

    def loaded(weights: Any) -> dict[str, np.ndarray]:
        stored = open_model(model, weights=weights)
        return {k: stored.parameters.read(k, np.dtype("float32"), lambda *_: None) for k in stored.parameters.shapes}

    convert(other, tmp_path / "orbax", to="orbax")
    listed = {"type": "llama", "checkpoints": ["model.safetensors"], "version": 1.0, "base_dir": str(other)}
    (other / "description.json").write_text(json.dumps({k: v for k, v in listed.items() if k != "base_dir"}))
    state = {key: torch.tensor(value) for key, value in load_file(other / "model.safetensors").items()}
    names = list(state)
    torch.save({key: state[key] for key in names[:3]}, tmp_path / "a.bin")
    torch.save({key: state[key] for key in names[3:]}, tmp_path / "b.bin")
    files = {"type": "BLOOM", "checkpoints": [str(tmp_path / "a.bin"), str(tmp_path / "b.bin")], "version": 1.0}
    for weights in (other, str(tmp_path / "orbax"), listed, other / "description.json", files):
        assert_same(loaded(weights), wanted)
    (other / "config.json").rename(other / "not-config.json")
    assert_same(loaded(other), wanted)

    wrong = {
        "parts": ({"checkpoints": {"tp": ["a"]}, "type": "ds_model"}, ConfigError, "cut for tensor parallelism"),
        "cut": ({"checkpoints": ["a"], "parallelization": "tp"}, ConfigError, "cut for tensor parallelism"),
        "absent": ({"checkpoints": ["nowhere.bin"]}, CheckpointError, r"not in \.: nowhere\.bin"),
        "none": ({"type": "x"}, ConfigError, "must have 'checkpoints'"),
        "key": ({"checkpoint": ["a"]}, ConfigError, "did you mean 'checkpoints'"),
        "folder": (tmp_path / "nowhere" / "at", CheckpointError, "no such folder"),
    }
    for weights, kind, message in wrong.values():
        with pytest.raises(kind, match=message):
            open_model(model, weights=weights)
    zoo.save("llama", tmp_path / "wider", intermediate_size=64)
    with pytest.raises(ConfigError, match="holds another model"):
        open_model(model, weights=tmp_path / "wider")


def test_errors_of_checkpoint_name_the_key(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path / "model")
    for options in ({}, {"model": tmp_path / "model"}):
        for given, said in {
            "./nope": "checkpoint: nope: no such folder",
            "": "checkpoint: '' is no folder and no hub id",
        }.items():
            with pytest.raises(CheckpointError, match=said):
                jdsi.init_inference(**options, checkpoint=given)
    with pytest.raises(CheckpointError, match=r"checkpoint: .*absent\.json: "):
        jdsi.init_inference(tmp_path / "model", checkpoint=str(tmp_path / "absent.json"))
    with pytest.raises(CheckpointError, match="'' is no folder and no hub id; give one"):
        jdsi.init_inference("")


def test_streaming_files_of_pytorch_says_what_works(tmp_path: Path) -> None:
    model, weights = tmp_path / "model", tmp_path / "weights"
    zoo.save("llama", model)
    weights.mkdir()
    state = {key: torch.tensor(value) for key, value in load_file(model / "model.safetensors").items()}
    torch.save(state, weights / "part.bin")
    advice = rf"`jdsi convert {weights} DST --to streaming` makes the latter of this one, once the config\.json"
    with pytest.raises(CheckpointError, match=advice):
        jdsi.init_inference(model, checkpoint={"checkpoints": [str(weights / "part.bin")]}, offload="nvme")
    (weights / "config.json").write_bytes((model / "config.json").read_bytes())
    convert(weights, tmp_path / "streaming", to="streaming")
    assert_same(arrays(tmp_path / "streaming"), arrays(model))


def test_an_untied_head_for_a_tied_model(tmp_path: Path) -> None:
    """What the config says of ties is not what makes it another model: weights decide."""
    tied, untied = tmp_path / "tied", tmp_path / "untied"
    zoo.save("llama", tied, tie_word_embeddings=True)
    zoo.save("llama", untied, tie_word_embeddings=False)
    wanted = arrays(untied)
    listed = {"checkpoints": [str(untied / "model.safetensors")]}
    for weights in (untied, listed):
        with pytest.warns(JdsiWarning, match="they are not tied"):
            engine = jdsi.init_inference(tied, checkpoint=weights, dtype="float32")
        for layout in ("hf", "orbax"):
            engine.save(tmp_path / layout, to=layout, overwrite=True)
            assert_same(arrays(tmp_path / layout), wanted)


def test_values_are_compared_and_not_bytes(tmp_path: Path) -> None:
    """Of different types, in blocks, of no dimension."""
    from jdsi.converters import Checkpoint

    big = np.arange(3 * 1024 * 1024, dtype=np.float32).reshape(3, -1) % 256
    late = big.copy()
    late[2, -1] += 1
    tensors = {"a": big, "b": big.astype(np.float16), "c": late, "d": big.T.copy(), "s": np.array(3, np.float32)}
    save_file(tensors, tmp_path / "x.safetensors")
    store = Checkpoint(tmp_path, [tmp_path / "x.safetensors"])
    found = store.tensors
    assert equal(store, found["a"], found["b"])
    assert equal(store, found["s"], found["s"])
    assert not any(equal(store, found["a"], found[other]) for other in "cd")
