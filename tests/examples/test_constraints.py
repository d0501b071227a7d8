"""The example of constraints runs, and its answers are among those it allows."""

import re
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "constraints.py"


def test_constraints(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    allowed = [{"os", "json", "numpy"}, {"x:", "range(x):"}, {"None:", "True:", "not None:"}]
    for line, texts in zip(lines, allowed, strict=False):
        answers = re.findall(r"(?:-> |, )(.+?) \(-\d", line)
        assert len(answers) == len(set(answers)) == 2, line
        assert set(answers) <= texts
    assert len(lines) == 6
