"""The GPU report's machinery on fake stages: whatever a stage does, it costs itself alone, and the report is whole."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jdsi.bench.gpu.journal import Journal, read_report
from jdsi.bench.gpu.run import _LEAST_SECONDS
from jdsi.bench.gpu.runner import Runner
from jdsi.bench.gpu.stage import RESERVE, Stage, Wave, allot, chosen
from jdsi.bench.gpu.stages import STAGES, gpu_tests
from jdsi.errors import ConfigError

HERE = Path(__file__).resolve().parent
PATIENCE = 60.0  # what must not be reached; a stage that is to be ended has less
LIMIT = 3.0  # of one that is to be ended: many times what it takes to get to where it hangs


def fake(name: str, function: str | None = None, **more: Any) -> Stage:
    return Stage(name, name, f"fake_stages:{function or name}", 1.0, **more)


def run(tmp_path: Path, *waves: Any, width: int = 4, until: float = 600) -> tuple[dict[str, Any], Runner]:
    """The report after waves of stages, each a stage or (stage, seconds), or a list of them."""
    made = []
    for wave in waves:
        members = [
            (one, PATIENCE) if isinstance(one, Stage) else one for one in (wave if isinstance(wave, list) else [wave])
        ]
        stages, seconds = zip(*members, strict=True)
        made.append(Wave(stages, seconds, due=0.0))
    journal = Journal(tmp_path / "report.json", {"rehearsal": True})
    journal.plan([(s, t) for wave in made for s, t in zip(wave.stages, wave.seconds, strict=True)])
    environment = {"PYTHONPATH": str(HERE)}
    runner = Runner(journal, width=width, scratch=tmp_path, task={}, environment=lambda stage: environment)
    runner.run(made, until)
    found = read_report(tmp_path / "report.json")
    assert found == json.loads(json.dumps(journal.report))
    return {entry["name"]: entry for entry in found["stages"]}, runner


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def pids(entry: dict[str, Any]) -> list[int]:
    return next(result["facts"]["pids"] for result in entry["results"] if "pids" in result.get("facts", {}))


def test_a_stage_that_goes_wrong_costs_only_itself(tmp_path: Path) -> None:
    wrong = [fake("raises"), fake("aborts"), fake("leaves"), (fake("hangs"), LIMIT)]
    found, _ = run(tmp_path, *wrong, fake("works", settings={"count": 3}))
    assert [len(entry["results"]) for entry in found.values()] == [1, 1, 1, 1, 3]
    assert [entry["state"] for entry in found.values()] == ["failed", "failed", "failed", "ended", "done"]
    assert found["raises"]["why"] == "ValueError: no good; it was at: the fatal thing"
    assert "Traceback" in found["raises"]["output"]
    assert "signal 6" in found["aborts"]["why"]
    assert "before its work was done" in found["leaves"]["why"]
    assert "more than its 3 s; it was at: triton, some case" in found["hangs"]["why"]
    # Where it was when it was ended.
    assert "now it hangs" in found["hangs"]["output"]
    assert "in hangs" in found["hangs"]["output"]
    assert found["works"]["results"][0]["seconds"] == "nan"
    log = (tmp_path / "report.log").read_text()
    assert all(f"=== {name}: " in log for name in found)


def test_nothing_that_a_stage_started_outlives_it(tmp_path: Path) -> None:
    found, _ = run(
        tmp_path,
        (fake("hanging", "breeds", settings={"hang": True}), LIMIT),
        fake("ending", "breeds", settings={"hang": False}),
        fake("forks"),
    )
    assert [entry["state"] for entry in found.values()] == ["ended", "done", "done"]
    assert [len(pids(entry)) for entry in found.values()] == [3, 3, 1]
    assert all(is_gone(pid) for entry in found.values() for pid in pids(entry))


def test_kernels_that_are_not_right_are_left_out_of_what_follows(tmp_path: Path) -> None:
    """Proofs run side by side; the one that hangs holds one of two places."""
    proofs = [
        (fake("hangs", operator="three"), LIMIT),
        fake("judges", operator="one"),
        fake("aborts", operator="two"),
        fake("raises", operator="four"),  # at nothing of a kernel's
        (fake("is_late", operator="five"), LIMIT),
    ]
    found, runner = run(tmp_path, proofs, fake("works"), width=2)
    assert [entry["state"] for entry in found.values()] == ["ended", "done", "failed", "failed", "ended", "done"]
    assert found["aborts"]["began"] < found["hangs"]["began"] + found["hangs"]["seconds"]
    left_out = found["works"]["results"][0]["facts"]["left out"]
    assert {name: list(kernels) for name, kernels in left_out.items()} == {
        "one": ["triton"],
        "two": ["pallas"],
        "three": ["triton"],
    }
    assert left_out == runner.left_out == read_report(tmp_path / "report.json")["left_out"]
    assert left_out["one"]["triton"] == "first: by far"
    assert "signal 6" in left_out["two"]["pallas"]


def test_without_a_vital_stage_there_is_nothing_to_run(tmp_path: Path) -> None:
    found, _ = run(tmp_path, fake("raises", vital=True), fake("works"), fake("more", "works"))
    assert [entry["state"] for entry in found.values()] == ["failed", "skipped", "skipped"]
    assert found["works"]["why"] == "raises failed, without which nothing can be measured"


def test_a_vital_stage_is_not_short_of_time(tmp_path: Path) -> None:
    found, _ = run(tmp_path, (fake("works", vital=True), 1.0), (fake("more", "works"), 1.0))
    assert [entry["limit"] for entry in found.values()] == [40.0, 1.0]


def test_what_has_no_time_left_is_named(tmp_path: Path) -> None:
    found, _ = run(tmp_path, fake("works"), until=0.0)
    assert found["works"]["state"] == "skipped"
    assert "no time is left" in found["works"]["why"]


def test_a_stage_stops_by_itself_where_a_case_would_not_fit(tmp_path: Path) -> None:
    stage = fake("has_many_cases", settings={"clock": [5.0, 20.0, 20.0, 20.0]})
    found, _ = run(tmp_path, (stage, 60.0))
    *done, rest = found["has_many_cases"]["results"]
    assert [result["what"] for result in done] == ["case 0", "case 1", "case 2"]
    assert rest["what"] == "3"
    assert rest["skipped"] == "1 cases: no time is left"


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_gpu_runner import fake, run
run(Path(sys.argv[1]), fake("works"), fake("trickles"), fake("never", "works"))
"""


def test_killed_at_any_point_it_leaves_a_readable_report(tmp_path: Path) -> None:
    """At a random finding and a random moment after it, by SIGKILL; nothing that it started stays."""
    draw = random.Random(os.environ.get("PYTEST_RANDOM", 7))
    processes = []
    for i in range(3):
        folder = tmp_path / str(i)
        folder.mkdir()
        code = KILLED.format(here=str(HERE))
        processes.append(
            (folder, subprocess.Popen([sys.executable, "-c", code, str(folder)], stderr=subprocess.DEVNULL))
        )
    for folder, process in processes:
        wanted, report = draw.randrange(1, 150), folder / "report.json"
        while process.poll() is None:
            if report.exists() and sum(len(entry["results"]) for entry in read_report(report)["stages"]) > wanted:
                break
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        found = read_report(report)
        works, trickles, never = found["stages"]
        assert not found["finished"]
        assert works["state"] == "done"
        assert trickles["state"] == "running"
        assert never["state"] == "waiting"
        assert len(works["results"]) + len(trickles["results"]) > wanted
        until = time.monotonic() + PATIENCE
        stage = pids(trickles)[0]
        while not is_gone(stage):  # the kernel ends it, in its own time
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(pids(trickles)[1], signal.SIGKILL)


def test_an_interrupt_ends_the_stage_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes while the journal takes down the first finding."""
    add = Journal.add

    def interrupted(self: Journal, stage: Stage, result: Any) -> None:
        add(self, stage, result)
        monkeypatch.setattr(Journal, "add", add)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fake("trickles"), fake("works"))
    trickles, works = read_report(tmp_path / "report.json")["stages"]
    assert trickles["state"] == "interrupted"
    assert works["state"] == "waiting"
    assert all(is_gone(pid) for pid in pids(trickles))


@pytest.mark.parametrize("cores", [1, 10])
def test_shares_leave_a_fifth_of_the_minutes(cores: int) -> None:
    for minutes, stages in ((8, STAGES), (15, STAGES), (8, (*STAGES, gpu_tests("tests")))):
        waves, left = allot(stages, 60 * minutes, width=cores, least=_LEAST_SECONDS if cores > 1 else 0)
        assert not left
        assert sum(max(wave.seconds) * -(-len(wave.stages) // cores) for wave in waves) == pytest.approx(48 * minutes)
        assert waves[-1].due == pytest.approx((1 - RESERVE) * 60 * minutes)
        # Even if every stage takes all that it may.
        now = 0.0
        for wave in waves:
            now += max(wave.limit(i, now) for i in range(len(wave.stages))) * -(-len(wave.stages) // cores)
        assert now <= (1 - RESERVE) * 60 * minutes * 1.001 or cores == 1
    assert len({stage.name for stage in STAGES}) == len(STAGES)


def test_what_one_stage_leaves_another_may_take() -> None:
    wave = Wave((fake("works"),), (10.0,), due=50.0)
    assert wave.limit(0, now=45.0) == 10.0
    assert wave.limit(0, now=35.0) == 15.0
    assert wave.limit(0, now=0.0) == 20.0


def test_of_few_minutes_the_most_valuable_stages_have_all() -> None:
    stages = [Stage(name, name, "x:y", weight) for name, weight in (("a", 10.0), ("b", 5.0), ("c", 20.0), ("d", 1.0))]
    waves, left = allot(stages, 100, width=1, least=20)
    assert [stage.name for wave in waves for stage in wave.stages] == ["a", "b"]
    assert [stage.name for stage in left] == ["c", "d"]
    assert list(itertools.chain(*(wave.seconds for wave in waves))) == pytest.approx([80 * 2 / 3, 80 / 3])
    waves, left = allot(stages, 1, width=1, least=20)
    assert [stage.name for wave in waves for stage in wave.stages] == ["a"]


def test_stages_are_chosen_by_name_or_kind() -> None:
    names = [stage.name for stage in chosen(STAGES, ["right", "decode/gpt-j"])]
    assert names[0] == "machine"
    assert names[-1] == "decode/gpt-j"
    assert {name.partition("/")[0] for name in names[1:-1]} == {"right"}
    assert chosen(STAGES, []) == STAGES
    with pytest.raises(ConfigError, match="did you mean 'decode'"):
        chosen(STAGES, ["decod"])
