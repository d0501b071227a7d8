"""The command's root: subcommands, and how errors reach the user."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import typer

from jdsi.errors import JdsiError, JdsiWarning

from .bench import bench
from .bench_gpu import gpu
from .classify import classify
from .convert import convert
from .generate import generate
from .inspect import inspect
from .plan import plan
from .tune import tune

app = typer.Typer(
    name="jdsi",
    help="DeepSpeed Inference on JAX/XLA: load a PyTorch checkpoint, run it fast on what you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(classify)
app.command()(convert)
app.command()(inspect)
app.command()(plan)
app.command()(tune)
bench.command()(gpu)
app.add_typer(bench)


def main() -> None:
    """Runs the command; a mistake of the user's ends in one line on stderr and exit code 1, never in a traceback."""
    # transformers would advise on every start to install PyTorch, which only its own models need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if sys.stdout is None:
        _complain("error: standard output is closed; redirect it to a file, or to /dev/null")
        sys.exit(1)
    _escape_what_cannot_be_shown()
    try:
        with _warnings_in_a_line():
            _run()
    except JdsiError as error:
        _complain(f"error: {' '.join(str(error).split())}")
        sys.exit(1)
    except KeyboardInterrupt:
        _complain("interrupted")
        sys.exit(130)
    except ImportError as error:
        if not _interrupted(error):  # a module that was being imported reports Ctrl-C as its own failure
            raise
        sys.exit(130)
    except BrokenPipeError:
        # The reader (head, a pager) has what it wanted.
        _leave_output()
        sys.exit(141)
    except OSError as error:
        _complain(f"error: {error}")
        _leave_output()
        sys.exit(1)


def _run() -> None:
    try:
        app()
    except SystemExit as end:
        # typer ends with 1 where a pipe is closed, and that is no mistake.
        if isinstance(end.__context__, BrokenPipeError):
            raise end.__context__ from None
        raise
    finally:
        sys.stdout.flush()  # Python would do so after everything, where nothing can be said of a full disk


def _complain(line: str) -> None:
    with contextlib.suppress(OSError, AttributeError):  # standard error may be closed, or full, as well
        sys.stderr.write(f"jdsi: {line}\n")


def _leave_output() -> None:
    """What is not written yet goes nowhere, or Python would complain while it closes standard output."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Shows what jdsi warns of as it shows errors, once each, and leaves other warnings as they are."""
    shown: set[str] = set()
    plain = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, JdsiWarning):
            plain(message, category, *where, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            sys.stderr.write(f"jdsi: warning: {message}\n")

    with warnings.catch_warnings():
        warnings.simplefilter("always", JdsiWarning)
        warnings.showwarning = show
        yield


def _escape_what_cannot_be_shown() -> None:
    """A model writes any character, and a terminal or a file may not be UTF-8: better a `\\xe9` than no answer."""
    for stream in (sys.stdout, sys.stderr):
        # Who names another way, as PYTHONIOENCODING=ascii:replace does, gets that.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _interrupted(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
