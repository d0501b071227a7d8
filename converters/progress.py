"""Progress of long reads and writes: a protocol, silence, and a bar."""

from typing import Protocol


class Progress(Protocol):
    """What is told how far a conversion has come; counts are bytes of weights."""

    def start(self, total_bytes: int) -> None:
        """Work begins; `advance` will add up to `total_bytes`."""
        ...

    def advance(self, num_bytes: int) -> None:
        """This many more bytes are done."""
        ...

    def finish(self) -> None:
        """Work ended, with or without success; called once after `start`."""
        ...


class Silent:
    """Shows nothing."""

    def start(self, total_bytes: int) -> None:
        pass

    def advance(self, num_bytes: int) -> None:
        pass

    def finish(self) -> None:
        pass


class ProgressBar:
    """A bar on standard error with bytes done, rate and time left."""

    def __init__(self, description: str) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(description, start=False, total=None)

    def start(self, total_bytes: int) -> None:
        self._bar.update(self._task, total=total_bytes)
        self._bar.start_task(self._task)
        self._bar.start()

    def advance(self, num_bytes: int) -> None:
        self._bar.advance(self._task, num_bytes)

    def finish(self) -> None:
        self._bar.stop()
