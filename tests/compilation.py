"""For tests of many programs that run but a few times each: XLA takes longer to compile them than they run."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def few_optimizations() -> Iterator[None]:
    """XLA optimises little of what is compiled in this block.

    What compares to the bit has no use for it: JAX knows a program by its function and arguments alone, so one that was
    compiled before, or will be called again behind the block, is what it was.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
