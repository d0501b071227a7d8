"""What every spec asks of its sizes."""

import numbers

from jdsi.errors import ConfigError


def check_sizes(**sizes: int) -> None:
    """Raises ConfigError for a size, by its name, that is no integer from 1 to the largest that an index can be."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, numbers.Integral) or not 1 <= size < 2**31:
            raise ConfigError(f"{name} is {size!r}; it must be an integer from 1 to {2**31 - 1}")
