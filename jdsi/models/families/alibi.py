"""ALiBi's slopes."""

import math

UNBOUNDED = 2**20
"""`max_positions` of models whose only positions are ALiBi's, which no table limits."""


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """One slope per head (Press et al. 2022, section 3).

    A power of two n of heads has `2^(-8/n), 2^(-16/n), ...`; other numbers add every other slope of the next power of
    two, as in the authors' code.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return tuple(slopes + between)
