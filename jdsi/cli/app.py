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
    _escape_what_cannot_be_shown()
    try:
        with _warnings_in_a_line():
            app()
    except JdsiError as error:
        sys.stderr.write(f"jdsi: error: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("jdsi: interrupted\n")
        sys.exit(130)
    except ImportError as error:
        if not _interrupted(error):  # a module that was being imported reports Ctrl-C as its own failure
            raise
        sys.exit(130)
    except BrokenPipeError:
        # The reader (head, a pager) has what it wanted; Python must not complain while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


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
