"""A checkpoint with code of its own: nothing of it runs, nothing is asked, token ids still work."""

import io
import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import transformers

import jdsi
from checkpoints import save_llama
from jdsi.cli import main
from jdsi.converters import load_model, load_spec
from jdsi.generation.tokenizer import load_tokenizer

CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast): pass
class OwnConfig(LlamaConfig): pass
class OwnModel(LlamaForCausalLM): pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own")
    save_llama(path)
    (path / "own.py").write_text(CODE.format(marker=str(path / "marker")))
    for name, entries in {
        "tokenizer_config.json": {"AutoTokenizer": ["own.OwnTokenizer", None]},
        "config.json": {
            "AutoConfig": "own.OwnConfig",
            "AutoModel": "own.OwnModel",
            "AutoModelForCausalLM": "own.OwnModel",
            "AutoTokenizer": ["own.OwnTokenizer", None],
        },
    }.items():
        content = json.loads((path / name).read_text()) | {"auto_map": entries}
        if name == "tokenizer_config.json":
            content["tokenizer_class"] = "OwnTokenizer"
        (path / name).write_text(json.dumps(content))
    return path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["jdsi", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


def test_no_code_of_a_checkpoint_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("asked")

    monkeypatch.setattr("builtins.input", ask)
    line = f"jdsi: warning: {folder}: the tokenizer is code of its own, own.OwnTokenizer, which is not run"
    ids = ("generate", folder, "--prompt-ids", "5,6,7", "--max-new-tokens", 3)
    told = {
        (*ids, "--json"): True,
        (*ids, "--stream"): True,
        (*ids, "--offload", "nvme"): True,
        (*ids, "--tensor-parallel", 2): True,
        ("inspect", folder, "--json"): False,
        ("plan", folder, "--topology", "h200:1", "--no-compile", "--context", 64): False,
        ("convert", folder, tmp_path / "orbax", "--json"): False,
        ("convert", folder, tmp_path / "hf", "--to", "hf", "--json"): False,
    }
    for arguments, warned in told.items():
        assert command(monkeypatch, *arguments) == 0, arguments
        shown = capsys.readouterr()
        assert sum(text.startswith(line) for text in shown.err.splitlines()) == warned, shown.err
        assert "[y/N]" not in shown.out + shown.err
        if "--json" in arguments:
            json.loads(shown.out)
    assert command(monkeypatch, "generate", folder, "--prompt", "text") == 1
    assert "prompt is text, and the model came without a tokenizer" in capsys.readouterr().err
    load_spec(folder)
    load_model(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jdsi.JdsiWarning)
        for path in (folder, tmp_path / "orbax", tmp_path / "hf"):
            assert load_tokenizer(path) is None
            with pytest.raises(
                jdsi.CheckpointError, match=r"code of its own, own\.OwnTokenizer, which is not run; give"
            ):
                load_tokenizer(path, required=True)
    assert not (folder / "marker").exists()


def test_a_class_that_transformers_has_is_used_and_no_code_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("PreTrainedTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast"):
        path = tmp_path / name
        shutil.copytree(folder, path)
        config = json.loads((path / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        wanted = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        ours = load_tokenizer(path, required=True)
        assert type(ours) is type(wanted)
        assert ours("def f(x):").input_ids == wanted("def f(x):").input_ids
        assert command(monkeypatch, "generate", path, "--prompt", "def f(", "--max-new-tokens", 2) == 0
        shown = capsys.readouterr()
        assert "[y/N]" not in shown.out + shown.err
        assert "code of its own" not in shown.err
    assert not (folder / "marker").exists()


def test_the_marker_is_what_the_code_would_leave(folder: Path, tmp_path: Path) -> None:
    """Or the test above could not fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(tmp_path))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert (folder / "marker").exists()
    (folder / "marker").unlink()
