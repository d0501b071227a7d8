"""What is held against another process, and what is not."""

import dataclasses
import sys

import jax
import numpy as np
import pytest

import jdsi
from jdsi.runtime import peers
from jdsi.runtime.peer_judge import Judge, Status


class _Pair:
    """Process 0's judge and what process 1 tells it, second by second."""

    def __init__(self) -> None:
        self.judge = Judge(own=0, count=2, patience=45)
        self.status = Status(tick=1)
        self.judge.hear({1: self.status})

    def problem(
        self, seconds: int, own: int = 0, *, waits: bool = False, silent: bool = False, **news: object
    ) -> str | None:
        """The first problem within so many seconds, in which process 0 waits in its turn `own`, or does not."""
        self.status = dataclasses.replace(self.status, **news)
        since = self.judge.now if waits else None
        for _ in range(seconds):
            self.judge.now += 1
            if not silent:
                self.status = dataclasses.replace(self.status, tick=self.status.tick + 1)
            self.judge.hear({0: Status(), 1: self.status})
            problem = self.judge.problem(own, since)
            if problem:
                return problem
        return None


def test_a_process_that_keeps_up() -> None:
    pair = _Pair()
    for turn in range(9):
        assert pair.problem(40, turn + 1, waits=True, turn=turn) is None


def test_silence() -> None:
    pair = _Pair()
    assert pair.problem(20, silent=True) is None
    assert pair.problem(1, silent=True) == "process 1 of 2 died or is suspended: no word from it for 21 s, after turn 0"


def test_a_hang() -> None:
    pair = _Pair()
    assert pair.problem(45, 4, waits=True, turn=3, place="at x.py:7 in f") is None
    assert pair.problem(45, 4, turn=3) is None  # nobody waits
    hang = "process 1 of 2 hangs: in turn 3 for 135 s, at x.py:7 in f, while process 0 waits in turn 4"
    assert pair.problem(46, 4, waits=True) == hang


def test_who_compiles_does_not_hang() -> None:
    pair = _Pair()
    assert pair.problem(500, 4, waits=True, turn=3, busy=True) is None
    assert pair.problem(45, 4, waits=True, busy=False) is None
    assert pair.problem(46, 4, waits=True) is not None


def test_much_may_happen_before_the_first_turn() -> None:
    pair = _Pair()
    assert pair.problem(315, 1, waits=True) is None
    assert "hangs: in turn 0 for" in str(pair.problem(316, 1, waits=True))


def test_an_end() -> None:
    pair = _Pair()
    assert pair.problem(500, 3, waits=True, turn=3, ended="normally") is None
    assert pair.judge.all_ended
    assert not pair.judge.deserted
    gone = "process 1 of 2 has ended normally after turn 3, while process 0 waits in turn 4"
    assert pair.problem(1, 4, waits=True) == gone


def test_an_end_with_an_error() -> None:
    pair = _Pair()
    assert pair.problem(1, 3, turn=3) is None
    assert pair.problem(20, 3, ended="with PeerError (x)") is None
    assert pair.problem(1, 3) == "process 1 of 2 has ended with PeerError (x) for 21 s, after turn 3"
    assert pair.judge.deserted


def test_a_process_that_does_not_come() -> None:
    judge = Judge(own=0, count=2, patience=45)
    judge.now = judge.answered = 300.0
    assert judge.problem(1, 0.0) is None
    judge.now = judge.answered = 316.0
    assert judge.problem(1, 0.0) == "process 1 of 2 has not come for 316 s"


def test_no_answer() -> None:
    judge = Judge(own=1, count=2, patience=45, now=10)
    judge.hear({})
    judge.now = 31
    problem = "process 0 of 2, which keeps the run together, has not answered for 20 s"
    assert judge.problem(1, None) == problem
    judge.now = 20
    assert judge.problem(1, None) is None
    assert judge.problem(1, None, suspicious=True) is not None


def test_busy_while_tracing() -> None:
    seen = []

    @jax.jit
    def f(x: jax.Array) -> jax.Array:
        seen.append(any(map(peers._is_busy, peers._frames(sys._getframe()))))
        return x

    f(np.ones(3))
    assert seen == [True]
    assert not any(map(peers._is_busy, peers._frames(sys._getframe())))


def test_settings_as_text() -> None:
    long = list(range(100))
    assert peers._text(2) == "2"
    assert len(peers._text(long)) < 70
    assert peers._text(long) != peers._text([*long[:-1], 0])
    assert peers._text(np.zeros(3, np.int32)) != peers._text(np.zeros(3, np.int64))


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "nan", "inf"])
def test_bad_patience(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("JDSI_PEER_PATIENCE", text)
    with pytest.raises(jdsi.ConfigError, match="JDSI_PEER_PATIENCE"):
        peers.patience()


def test_alone() -> None:
    assert peers.start() is None
    assert peers.agree({"a": 1}, offer="7") == "7"
    with peers.turn(), peers.waiting():
        pass
