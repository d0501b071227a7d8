"""The errors jdsi raises on purpose. Each message names what was wrong, where, and what would be right."""

import difflib
from collections.abc import Iterable


class JdsiError(Exception):
    """Base of every error that jdsi raises on purpose; the CLI prints these without a traceback."""


class ConfigError(JdsiError, ValueError):
    """An option or a combination of options that cannot be honoured."""


class UnsupportedError(JdsiError, ValueError):
    """An operator's implementation that was named and cannot take the arguments; the message gives the reason."""


class CheckpointError(JdsiError):
    """A checkpoint that is missing, damaged, or does not fit the model it is read for."""


class CapacityError(JdsiError):
    """A request that exceeds the context, the cache or the memory it would run in."""


class PeerError(JdsiError):
    """Another process of the same run died, hangs, or did not come."""


class PromptError(JdsiError, ValueError):
    """A prompt the model cannot take: empty, of the wrong type, or with token ids outside the vocabulary."""


class JdsiWarning(UserWarning):
    """Something about a checkpoint or a request that is not an error and that a user should know."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the valid name closest to `name`, or `""` when none is close."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
