"""A process that dies or hangs makes the others stop with a named error in time."""

import json
import re
from contextlib import ExitStack
from pathlib import Path

from peer_processes import Run, pickled_model

PATIENCE = 14
FAULTS = {  # by name, whose, and what the other process says
    "dies": (0, "process 0 of 2, which keeps the run together, has died"),
    "is suspended": (1, "process 1 of 2 died or is suspended"),
    "sleeps": (1, "process 1 of 2 hangs: .* in steps, while process 0 waits in turn"),
    "raises": (1, "process 1 of 2 has ended with RuntimeError"),
}


def test_lost_processes(tmp_path: Path) -> None:
    pickled_model("gpt2", tmp_path / "model.pickle")
    with ExitStack() as stack:  # all at once, for most of the time they wait
        runs = {}
        for fault, (victim, _) in FAULTS.items():
            folder = tmp_path / fault
            folder.mkdir()
            (folder / "fault.json").write_text(json.dumps([fault, victim]))
            runs[fault] = stack.enter_context(Run("lost", folder, 2, 1, JDSI_PEER_PATIENCE=str(PATIENCE)))
        for fault, (victim, message) in FAULTS.items():
            run, other = runs[fault], 1 - victim
            assert run.ended([other], within=150) == {other: 1}, run.output()
            took = run.ended_at(other) - float((tmp_path / fault / "fault").read_text())
            assert re.search(f"^jdsi.errors.PeerError: {message}", run.output(other), re.MULTILINE), run.output()
            assert took < 60 * PATIENCE / 45 + 5, f"a process that {fault} was noticed after {took:.0f} s"


def test_nobody_comes(tmp_path: Path) -> None:
    with Run("alone", tmp_path, 2, 1, start=1) as run:
        assert run.ended(within=60) == {0: 1}, run.output()
        assert re.search("^jdsi.errors.PeerError: process 0 of 2 waited 3 s", run.output(), re.MULTILINE), run.output()
