"""Compiled programs on disk, so that a second start does not compile again."""

import os
from pathlib import Path

import jax
import jax.monitoring
from jax.experimental.compilation_cache import compilation_cache as jax_cache

_HITS = "/jax/compilation_cache/cache_hits"
_MISSES = "/jax/compilation_cache/cache_misses"
_JAX_MINIMUM_SECONDS = 1.0
_counts: dict[str, int] = {_HITS: 0, _MISSES: 0}


def _count(event: str, **_: object) -> None:
    if event in _counts:
        _counts[event] += 1


jax.monitoring.register_event_listener(_count)


def enable_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path:
    """Turns on JAX's persistent compilation cache for the whole process.

    Args:
        folder: where to keep programs. Default: where the program or `JAX_COMPILATION_CACHE_DIR` already put it, else
            `$XDG_CACHE_HOME/jdsi/xla`, else `~/.cache/jdsi/xla`.

    Returns:
        The folder in force.
    """
    current = jax.config.jax_compilation_cache_dir
    if folder is None and current is not None:
        return Path(current)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    chosen = Path(folder).expanduser() if folder is not None else base / "jdsi" / "xla"
    if str(chosen) != current:
        jax.config.update("jax_compilation_cache_dir", str(chosen))
        jax_cache.reset_cache()  # JAX opens the folder once and would stay with the old one
    # JAX's default skips programs that compiled in under a second, which is most of a small model's.
    if jax.config.jax_persistent_cache_min_compile_time_secs == _JAX_MINIMUM_SECONDS:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return chosen


def compilation_counts() -> tuple[int, int]:
    """`(hits, misses)` of the persistent cache in this process so far."""
    return _counts[_HITS], _counts[_MISSES]
