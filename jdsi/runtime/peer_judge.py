"""What the processes of a run tell each other, and whether that means that one of them is lost."""

import dataclasses
from collections.abc import Mapping

from jdsi.errors import PeerError


@dataclasses.dataclass(frozen=True)
class Status:
    """What a process tells the others.

    Attributes:
        tick: grows by one each time.
        turn: how many turns it has begun.
        busy: it compiles or loads.
        place: the line of Python that it is at.
        ended: `""`, or how its program ended.
    """

    tick: int = 0
    turn: int = 0
    busy: bool = False
    place: str = ""
    ended: str = ""


@dataclasses.dataclass
class _Peer:
    """What is known of another process; times by our own clock."""

    status: Status
    heard: float
    moved: float

    def hear(self, status: Status, now: float) -> None:
        if status.tick != self.status.tick and not status.ended.startswith("with"):
            self.heard = now
        if status.turn != self.status.turn or status.busy:
            self.moved = now
        self.status = status


@dataclasses.dataclass
class Judge:
    """Decides from what the others tell whether the run is lost. Knows no threads and no clock.

    Attributes:
        own, count: this process and how many there are.
        patience: seconds that a process may leave the others waiting.
        now: seconds since the start; a process that was suspended itself must not count that time.
        answered: when the others' words were last read.
    """

    own: int
    count: int
    patience: float
    now: float = 0.0
    answered: float = 0.0

    def __post_init__(self) -> None:
        self._peers = {p: _Peer(Status(), 0.0, 0.0) for p in range(self.count) if p != self.own}

    @property
    def silence(self) -> float:
        """Seconds without a word after which a process counts as dead: 20 of the 45."""
        return self.patience * 4 / 9

    def hear(self, told: Mapping[int, Status]) -> None:
        """Notes what the others told."""
        self.answered = self.now
        for process, status in told.items():
            if process in self._peers:
                self._peers[process].hear(status, self.now)

    @property
    def all_ended(self) -> bool:
        """Whether the programs of all others have ended."""
        return all(peer.status.ended for peer in self._peers.values())

    @property
    def deserted(self) -> bool:
        """Whether one of the others has given the run up, and will not wait for any more."""
        return any(peer.status.ended.startswith(f"with {PeerError.__name__}") for peer in self._peers.values())

    def problem(self, turn: int, waiting_since: float | None, *, suspicious: bool = False) -> str | None:
        """What is wrong, or `None`.

        Args:
            turn: of this process.
            waiting_since: when it began to wait in that turn, `None` if it does not.
            suspicious: a connection broke, so that the next silence means something.
        """
        silence, long = self.silence / 3 if suspicious else self.silence, 7 * self.patience
        if self.now - self.answered > silence:
            return f"{self._name(0)}, which keeps the run together, has not answered for {silence:.0f} s"
        for process, peer in self._peers.items():
            status, quiet = peer.status, self.now - peer.heard
            behind = waiting_since is not None and status.turn < turn
            waits = f"while process {self.own} waits in turn {turn}"
            if status.ended and behind:
                return f"{self._name(process)} has ended {status.ended} after turn {status.turn}, {waits}"
            if not status.tick:  # its watch has not started; JAX's own heartbeats notice if it dies
                if self.now > long:
                    return f"{self._name(process)} has not come for {self.now:.0f} s"
            elif quiet > silence:
                state = f"has ended {status.ended}" if status.ended else "died or is suspended: no word from it"
                return f"{self._name(process)} {state} for {quiet:.0f} s, after turn {status.turn}"
            elif behind and self.now - max(peer.moved, waiting_since or 0.0) > (self.patience if status.turn else long):
                since = f"in turn {status.turn} for {self.now - peer.moved:.0f} s"
                return f"{self._name(process)} hangs: {since}, {status.place}, {waits}"
        return None

    def _name(self, process: int) -> str:
        return f"process {process} of {self.count}"
