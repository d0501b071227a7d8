"""The GPU report as people get it: the command, its goals, Markdown and picture; on figures made up here."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jdsi.bench.gpu import run as gpu_run
from jdsi.bench.gpu.goals import GOALS, goals_of
from jdsi.bench.gpu.journal import FORMAT, read_report
from jdsi.bench.gpu.picture import draw
from jdsi.bench.gpu.run import bench_gpu
from jdsi.bench.gpu.shortfall import fell_short
from jdsi.bench.gpu.show import is_measured, markdown
from jdsi.bench.gpu.stage import Stage
from jdsi.bench.gpu.stages import STAGES
from jdsi.bench.report import spread
from jdsi.cli.app import app
from jdsi.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def command(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["bench", "gpu", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def ratio(value: float) -> dict[str, Any]:
    return {"median": value, "minimum": value - 0.01, "maximum": value + 0.01, "rounds": [value]}


def stage(name: str, *results: dict[str, Any], state: str = "done", **more: Any) -> dict[str, Any]:
    found = [{"by": "", **result} for result in results]
    return {"name": name, "title": name, "limit": 10.0, "seconds": 3.0, "state": state, "results": found, **more}


def measured(*stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A report as if from a GPU."""
    gpu = {"what": "GPU", "facts": {"name": "NVIDIA H200", "driver_version": "580.1", "jax": "0.12"}}
    limits = stage(
        "limits",
        {"what": "copy", "seconds": spread([1e-3]), "bytes": 4_300_000_000},
        {"what": "matmul", "seconds": spread([1e-3]), "flops": 790_000_000_000},
    )
    about = {"format": FORMAT, "rehearsal": False, "started": "now", "settings": {"minutes": 8}, "finished": True}
    return {**about, "seconds": 400.0, "stages": [stage("machine", gpu), limits, *stages], **more}


LINEAR = stage(
    "speed/linear",
    {"what": "out T=1 bf16", "by": "pallas", "operator": "linear", "seconds": spread([1e-5]), "bytes": 33554432,
     "flops": 33554432, "share": ratio(0.9), "over": {"xla": ratio(1.5)}, "error": 1e-3},
    {"what": "out T=10 bf16", "by": "pallas", "operator": "linear", "seconds": spread([2e-5]), "bytes": 33554432,
     "flops": 335544320, "share": ratio(0.5), "over": {"xla": ratio(1.1)}, "error": 1e-3},
    {"what": "out T=64 bf16", "by": "pallas", "operator": "linear", "seconds": spread([4e-5]), "bytes": 33554432,
     "flops": 2147483648, "share": ratio(0.95), "over": {"xla": ratio(0.8)}, "error": 1e-3},
    {"what": "out T=1 bf16", "by": "xla", "operator": "linear", "seconds": spread([1e-5]), "bytes": 1, "flops": 1,
     "share": ratio(0.6), "over": {"pallas": ratio(0.7)}, "error": 0.0},
    {"what": "up T=8 bf16", "by": "triton", "operator": "linear", "failed": "no registers | at all"},
    *({"what": f"case {i}", "by": "cudnn", "skipped": "it is too long"} for i in range(4)),
)  # fmt: skip
DECODE = stage(
    "decode/llama-8b",
    {"what": "llama-8b batch 1", "by": "kernels", "seconds": spread([4e-3]), "bytes": 15_000_000_000,
     "flops": 15_000_000_000, "tokens_per_second": spread([250.0]), "share": ratio(0.87),
     "over": {"torch.compile": ratio(1.31), "xla": ratio(1.4)}},
    {"what": "llama-8b batch 64", "by": "kernels", "seconds": spread([5e-3]), "bytes": 15_000_000_000,
     "flops": 960_000_000_000, "share": ratio(0.5), "over": {}},
)  # fmt: skip


def test_goals_count_their_worst_case() -> None:
    found = {goal["goal"]: goal for goal in goals_of(measured(LINEAR, DECODE))}
    assert found.keys() == {goal.name for goal in GOALS}
    share, over, small, attention, *_ = found.values()
    assert share["met"]
    assert share["worst"] == 0.87  # batch 64 is no part of it
    assert share["by"] == pytest.approx(0.87 / 0.85 - 1)
    assert over["met"]
    assert not small["met"]  # nor are 64 tokens, nor XLA
    assert (small["worst"], small["where"], small["cases"]) == (1.1, "out T=10 bf16", 2)
    assert small["median"] == pytest.approx(1.3)
    assert attention["met"] is None
    rehearsed = goals_of(measured(LINEAR, DECODE) | {"rehearsal": True})
    assert {goal["met"] for goal in rehearsed} == {None}


def test_every_goal_is_about_a_stage_that_there_is() -> None:
    assert {goal.stage for goal in GOALS} <= {stage.name for stage in STAGES}


def test_what_fell_short_is_what_tuning_begins_with() -> None:
    assert fell_short(measured(LINEAR, DECODE)) == {"linear": ["out T=10 bf16", "out T=64 bf16"]}


def test_a_measured_report_as_markdown() -> None:
    running = stage("profile", state="running", doing="tracing")
    left_out = {"linear": {"triton": "up T=8 bf16: no registers"}}
    text = markdown(measured(LINEAR, DECODE, running, left_out=left_out, finished=False))
    assert text.startswith("# Measured on NVIDIA H200, driver 580.1\n")
    assert "| met by 2% |" in text
    assert "| MISSED by 8% |" in text
    assert "1.10 (out T=10 bf16, of 2)" in text
    assert "| not measured |" in text
    assert "- linear, triton: up T=8 bf16: no registers" in text
    assert "the program was ended while it was at: tracing" in text
    assert "ended before the report was" in text
    assert "| out T=1 bf16 | pallas | 10 us | 3.36e+03 | 3.36 |" in text
    assert "250" in text
    assert "torch.compile 1.31 (1.30 to 1.32)" in text
    assert "FAILED: no registers \\| at all" in text
    assert "- left out, cudnn: it is too long (case 0, case 1 and 2 more)" in text
    tables = [line for line in text.splitlines() if line.startswith("|---")]
    assert len(tables) == 5  # goals, stages, and three of them with figures


def test_a_rehearsal_is_never_called_measured(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(measured(LINEAR, DECODE) | {"rehearsal": True}))
    shown = command("--show", path)
    assert shown.stdout.startswith("# REHEARSAL without a GPU: nothing here is a measurement\n")
    # No figure of it, and no verdict.
    for word in ("10 us", "MISSED", "met by", "GB/s", "0.87"):
        assert word not in shown.stdout
    assert "no picture: a picture is drawn of measured reports only" in shown.stderr
    assert not list(tmp_path.glob("*.png"))
    with pytest.raises(ConfigError, match="measured reports only"):
        command("--show", path, "--picture", tmp_path / "asked.png")
    nothing = measured(LINEAR)
    nothing["stages"][0]["state"] = "failed"
    assert not is_measured(nothing)
    assert markdown(nothing).startswith("# NOT MEASURED: no GPU answered\n")


def test_a_measured_report_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(measured(LINEAR, DECODE)))
    shown = command("--show", path)
    assert f"drawn: {tmp_path / 'report.png'}" in shown.stderr
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(command("--show", path, "--json").stdout)["format"] == FORMAT
    bare = measured(DECODE)
    del bare["stages"][1]
    with pytest.raises(ConfigError, match="no limits"):
        draw(bare, tmp_path / "no.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "no picture: a picture needs matplotlib" in command("--show", path).stderr


def test_a_rehearsal_through_the_command(tmp_path: Path) -> None:
    """One real stage in a process of its own."""
    path = tmp_path / "new" / "report.json"
    shown = command("--rehearse", "--stage", "machine", "--output", path)
    assert "REHEARSAL" in shown.stdout
    report = read_report(path)
    assert report["finished"]
    assert report["rehearsal"]
    (machine,) = report["stages"]
    assert machine["state"] == "done"
    assert machine["results"][0]["facts"]["device"] == "cpu"
    assert {goal["met"] for goal in report["goals"]} == {None}
    assert "machine: done" in path.with_suffix(".log").read_text()
    with pytest.raises(ConfigError, match="exists; name another"):
        command("--rehearse", "--output", path)


def test_without_a_gpu_nothing_is_measured_and_the_command_says_so(tmp_path: Path) -> None:
    shown = command("--output", tmp_path / "report.json", "--minutes", "3", code=1)
    assert "NOT MEASURED" in shown.stdout
    stages = read_report(tmp_path / "report.json")["stages"]
    assert stages[0]["state"] == "failed"
    assert "JAX finds no NVIDIA GPU here" in stages[0]["why"]
    assert {one["state"] for one in stages[1:]} == {"skipped"}
    assert len(stages) == len(STAGES)


def test_tuning_comes_last_and_only_where_something_fell_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    works = Stage("works", "works", "fake_stages:works", 1.0)
    tunings = []

    def tuning(cases: Any, table: str) -> Stage:
        tunings.append((cases, table))
        return Stage("tune", "tune", "fake_stages:works", 1.0, {"cases": cases})

    monkeypatch.setattr(gpu_run, "tuning", tuning)
    report = bench_gpu(tmp_path / "one.json", minutes=1, rehearse=True, tune=0.5, catalogue=[works])
    assert [one["name"] for one in report["stages"]] == ["works"]
    monkeypatch.setattr(gpu_run, "fell_short", lambda report: {"linear": ["out T=1"]})
    report = bench_gpu(tmp_path / "two.json", minutes=1, rehearse=True, tune=0.5, catalogue=[works])
    assert [(one["name"], one["state"], one["limit"]) for one in report["stages"]][1] == ("tune", "done", 30.0)
    assert tunings == [({"linear": ["out T=1"]}, str(tmp_path / "two.tuning.json"))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--minutes", "0"), "minutes=0.0 must be positive"),
        (("--tune", "-1"), "tune=-1.0 not negative"),
        (("--stage", "decod"), "did you mean 'decode'"),
        (("--tests", "no/such/folder"), "is no folder of tests"),
        (("--picture", "a.png"), "--picture goes with --show"),
        (("--show", "no/such/report.json"), "cannot be read"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        command("--output", tmp_path / "report.json", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_report_is_named(tmp_path: Path) -> None:
    for text in ("[1]", '{"format": 99, "stages": []}', '{"format": 1}', "{"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ConfigError, match=r"x\.json"):
            read_report(tmp_path / "x.json")


def test_only_measured_reports_are_kept_in_the_repository() -> None:
    for path in (ROOT / "docs" / "reports").glob("*.json"):
        assert is_measured(read_report(path)), f"{path.name} is no measurement"
