"""`jdsi tune` as a user meets it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fake_operator as fake
from jdsi.bench import calls
from jdsi.cli.app import app
from jdsi.pallas_kernels.device import H200, target


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(calls, "_FIGURE_SECONDS", 1e-5)
    with target(H200):
        yield


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["tune", "--rounds", "1", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


def test_findings_are_printed_and_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: None) -> None:
    fake.register(monkeypatch, fake.specs(sizes=(4, 8)), pallas=fake.kernel())
    table = tmp_path / "tuning.json"
    shown = run("--output", table)
    assert "cube, small: " in shown
    assert "times as fast as XLA" in shown
    assert f"2 entries written to {table}" in shown
    report = json.loads(run("--output", table, "--match", "n=8", "--json"))
    assert [(one["tuned"], one["bucket"]) for one in report["outcomes"]] == [(True, "large")]
    assert report["table"] == str(table)
    assert json.loads(table.read_text())[H200.kind]["cube"].keys() == {"small", "large"}


def test_ctrl_c_keeps_what_was_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: None) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    module = fake.kernel()
    fake.register(monkeypatch, fake.specs(sizes=(4, 8)), pallas=module)
    usual = module.candidates
    module.candidates = lambda x, *rest, **static: (usual if x.size == 4 else interrupted)(x, *rest, **static)
    table = tmp_path / "tuning.json"
    report = json.loads(run("--output", table, "--json", code=130))
    assert report["interrupted"]
    assert [one["bucket"] for one in report["outcomes"]] == ["small"]
    assert json.loads(table.read_text())[H200.kind]["cube"].keys() == {"small"}


def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    """In a process of its own, with the real operators."""
    command = [sys.executable, "-c", "from jdsi.cli import main; main()", "tune", "--output", str(tmp_path / "t.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("jdsi: error: ")
    assert "NVIDIA GPU" in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())
