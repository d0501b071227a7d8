"""A folder that appears whole or not at all."""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from jdsi.errors import CheckpointError

from .manifest import MANIFEST

_SLACK = 16 << 20
_RANDOM = "[0-9a-f]" * 8


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint, ours or Hugging Face's."""
    if (folder / MANIFEST).is_file():
        return True
    weights = (".safetensors", ".bin", ".pt", ".pth")
    return (folder / "config.json").is_file() and any(file.suffix in weights for file in folder.iterdir())


def check_destination(target: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Refuse a destination that must not be written.

    Raises:
        CheckpointError: it exists and `overwrite` is not given; it would be overwritten but is not a checkpoint; or
            it is the source, inside it, or around it.
    """
    target = target.absolute()
    if source is not None:
        real, origin = target.resolve(), source.resolve()
        if real == origin or origin in real.parents or real in origin.parents:
            raise CheckpointError(f"{target}: the destination must be apart from the source {source}")
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise CheckpointError(f"{target}: exists and is not a folder")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{target}: exists; choose another destination, or --overwrite it (overwrite=True)")
    if not is_checkpoint(target):
        raise CheckpointError(f"{target}: not a checkpoint, so it is not overwritten; remove it yourself")


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool, needed_bytes: int) -> Iterator[Path]:
    """Yields a temporary folder beside `target` that becomes `target` if the block succeeds.

    The block's files are flushed to disk before the rename. If the block fails the temporary folder is removed; if
    the process is killed, the next call for the same `target` removes it.

    Args:
        target: the folder to make; its parents are made too.
        overwrite: replace an existing checkpoint, only once the new one is complete.
        needed_bytes: what the block is going to write, to refuse a disk that is too full beforehand.

    Raises:
        CheckpointError: as `check_destination`; the disk is too full; or the place cannot be written.
    """
    target = target.absolute()
    check_destination(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean(target)
        check_destination(target, overwrite=overwrite)
        partial = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
        partial.mkdir()
        free = shutil.disk_usage(target.parent).free
        if free < needed_bytes + _SLACK:
            partial.rmdir()
            raise CheckpointError(
                f"{target}: the disk is too full: {needed_bytes + _SLACK:,} bytes needed, {free:,} free"
            )
    except OSError as error:
        told = _explain(error, target, needed_bytes)
        raise (
            told if told is not error else CheckpointError(f"{target}: cannot be written: {error.strerror}")
        ) from error
    # The lock tells a folder being written from one that a killed process left.
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield partial
        _flush(partial)
        _swap(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, Exception) and (told := _explain(error, target, needed_bytes)) is not error:
            raise told from error
        raise
    finally:
        os.close(lock)


def _clean(target: Path) -> None:
    """Finish or undo what killed runs for the same target left."""
    for folder in target.parent.glob(f"{_escape(target.name)}.previous-{_RANDOM}"):
        # Killed between the two renames of an overwrite: the old checkpoint is the only one.
        if target.exists():
            shutil.rmtree(folder)
        else:
            os.rename(folder, target)
    for folder in target.parent.glob(f"{_escape(target.name)}.partial-{_RANDOM}"):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        except BlockingIOError:
            pass  # another process is writing it
        finally:
            os.close(descriptor)


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _flush(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for path in [*(os.path.join(parent, file) for file in files), parent]:
            _fsync(path)


def _fsync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(partial: Path, target: Path) -> None:
    previous = None
    if target.exists() and any(target.iterdir()):
        previous = target.with_name(f"{target.name}.previous-{secrets.token_hex(4)}")
        os.rename(target, previous)
    try:
        os.rename(partial, target)
    except BaseException:
        if previous is not None:
            os.rename(previous, target)
        raise
    _fsync(target.parent)
    if previous is not None:
        shutil.rmtree(previous)


def _explain(error: Exception, target: Path, needed_bytes: int) -> Exception:
    """A `CheckpointError` for a full or unwritable disk, anything else as it is."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, CheckpointError):
        code = cause.errno if isinstance(cause, OSError) else None
        # Orbax reports a full disk as text.
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(cause):
            free = shutil.disk_usage(target.parent).free
            return CheckpointError(
                f"{target}: the disk is full: {needed_bytes:,} bytes needed, {free:,} free now; nothing was kept"
            )
        if code in (errno.EACCES, errno.EPERM, errno.EEXIST, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG):
            return CheckpointError(f"{target}: cannot be written: {os.strerror(code)}")
        cause = cause.__cause__ or cause.__context__
    return error
