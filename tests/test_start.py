"""What a process of the command imports, and when: nothing slow before it is needed, PyTorch only for its own files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from checkpoints import save_llama
from jdsi.cuda_compiler import FOLDER
from jdsi.without_torch import import_transformers_without_torch

TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny-python-lm"

# Runs commands one after another in one process; prints for each its exit code and what is imported when it ends.
COMMANDS = """
import contextlib, io, json, sys
from jdsi.cli import main
found = []
for arguments in json.loads(sys.argv[1]):
    sys.argv, out, code = ["jdsi", *arguments], io.StringIO(), None
    try:
        with contextlib.redirect_stdout(out):
            main()
    except SystemExit as ended:
        code = ended.code
    slow = sorted({"flax", "jax", "numpy", "torch", "transformers"} & sys.modules.keys())
    found.append([code or 0, slow, out.getvalue()])
print(json.dumps(found))
"""


def imported_by(*commands: list[str]) -> list[tuple[int, list[str], str]]:
    """Exit code, slow modules imported so far and output of each of the commands, run by one new process."""
    command = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [(code, slow, out) for code, slow, out in json.loads(done.stdout.splitlines()[-1])]


def test_help_and_mistaken_arguments_import_nothing_slow(tmp_path: Path) -> None:
    found = imported_by(
        ["--help"],
        ["generate", "--help"],
        ["bench", "decode", "--help"],
        ["--nonsense"],
        ["generate", str(TINY), "--nonsense"],
        ["generate", str(TINY)],
        ["generate", str(TINY), "--prompt-ids", "five"],
        ["generate", str(TINY), "--prompt", "a", "--sampling", "{"],
        ["classify", str(TINY), "--pair", "a"],
        ["plan", str(TINY), "--topology", "h200", "--goal", "both"],
        ["bench", "decode", "--batch", "four"],
        ["bench", "offload", "--cap", "--quantize", "int4"],
        ["bench", "parallel", "--micro-batches", "four"],
        ["bench", "gpu", "--picture", str(tmp_path / "roofline.png")],
    )
    assert [code for code, _, _ in found] == [0] * 3 + [2] * 3 + [1] * 2 + [2] + [1] * 5
    assert [slow for _, slow, _ in found] == [[]] * len(found)
    assert "generate" in found[0][2]


def test_pytorch_is_imported_for_its_own_files_only(tmp_path: Path) -> None:
    save_llama(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    options = ["--prompt-ids", "5,6,7", "--max-new-tokens", "3", "--json"]
    from_safetensors = ["generate", str(tmp_path), *options]
    first, tiny, inspected, converted = imported_by(
        from_safetensors,
        ["generate", str(TINY), "--prompt", "def ", "--max-new-tokens", "2"],
        ["inspect", str(TINY), "--json"],
        ["convert", str(TINY), str(tmp_path / "orbax"), "--json"],
    )
    assert first[0] == tiny[0] == inspected[0] == converted[0] == 0
    assert tiny[2].startswith("def ")
    assert converted[1] == ["flax", "jax", "numpy", "transformers"]
    (tmp_path / "model.safetensors").unlink()
    ((code, slow, answer),) = imported_by(from_safetensors)
    assert code == 0
    assert "torch" in slow
    assert json.loads(answer)["completions"] == json.loads(first[2])["completions"]


def test_transformers_keeps_pytorch_where_others_may_want_it() -> None:
    import_transformers_without_torch()
    assert sys.modules["torch"] is torch
    assert transformers.utils.is_torch_available()


@pytest.mark.aot
def test_plan_finds_the_compiler_beside_the_environment(tmp_path: Path) -> None:
    """As `make venv` leaves it; in the environment of a user, who sets nothing."""
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    arguments = ["plan", str(tmp_path), "--topology", "h200:2", "--tensor-parallel", "2", "--context", "256", "--json"]
    set_by_tests = ("JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK")
    environment = {name: value for name, value in os.environ.items() if name not in set_by_tests}
    before = "import sys, pathlib, jdsi.cuda_compiler; "
    run = f"sys.argv = ['jdsi', *{arguments}]; from jdsi.cli import main; main()"
    elsewhere = f"jdsi.cuda_compiler.FOLDER = pathlib.Path({str(tmp_path)!r}) / 'cuda-compiler'; "
    found, missing = (
        subprocess.run(
            [sys.executable, "-c", before + code + run], capture_output=True, text=True, env=environment, timeout=300
        )
        for code in ("", elsewhere)
    )
    assert found.returncode == 0, found.stderr
    (stage,) = json.loads(found.stdout)["stages"]
    assert stage["decode"]["kernels"] > 0
    assert stage["decode"]["collectives"][0]["axis"] == "tensor"
    if FOLDER.is_dir():  # and not among the environment's own packages, where it needs no finding
        assert missing.returncode == 1
        assert f"no compiler for h200: install it with {sys.executable} -m pip install" in missing.stderr
        assert f"--target {tmp_path / 'cuda-compiler'} jax-cuda13-plugin==" in missing.stderr
