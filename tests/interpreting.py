"""What `jdsi bench gpu --rehearse` interprets kernels with in a checkout: an interpreter that the tests have taught."""

import contextlib
from collections.abc import Iterator

from accumulators import accumulators
from kernels import interpreted
from linear_cases import kernels_run
from packed_numbers import packed_numbers


@contextlib.contextmanager
def interpreting(operator: str, cores: int) -> Iterator[None]:
    """Within it an operator's Mosaic GPU kernel runs in the interpreter, on an H200 of so many multiprocessors."""
    if operator == "linear":
        with kernels_run(cores):
            yield
        return
    taught = packed_numbers if operator == "quantized_linear" else accumulators
    with taught(), interpreted(cores):
        yield
