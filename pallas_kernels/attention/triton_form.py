"""What the Triton attention kernels are compiled for: a form and head sizes, as compile-time constants, and blocks."""

import dataclasses
import math
from typing import Any

import jax

from ..device import Device
from .form import AttentionForm, RoundedAlibi


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a kernel cuts its work.

    Attributes:
        block_m: rows at a time, a row being one query of one head; a power of two, at least 16.
        block_n: keys at a time; a power of two, at least 16.
        warps: of one block.
        stages: loads of keys in flight, and one.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int

    def paged_stages(self) -> int:
        """What Triton must be told for `stages` with a block table, whose entries it loads just as early again."""
        return 2 * self.stages - 1

    def shared_memory(self, dim: int, value_dim: int, itemsize: int, *, shared_values: bool) -> int:
        """Bytes the kernel takes at most: keys and values of all stages, queries, weights, a block table's entries."""
        main, tail = split(dim)
        keys = (self.stages - 1) * self.block_n * (main + tail + (0 if shared_values else power(value_dim))) * itemsize
        return keys + 2 * self.block_m * (main + tail + self.block_n) + 8 * self.stages * self.block_n


def power(n: int) -> int:
    """The least power of two that is at least `n` and 16, the tensor cores' least."""
    return max(16, 1 << (n - 1).bit_length())


def split(dim: int) -> tuple[int, int]:
    """Two numbers that hold `dim` together, powers of two or 0 for the second: 576 is 512 + 64, 80 is 64 + 16."""
    main = 1 << (dim.bit_length() - 1)
    if main < 16 or dim == main:
        return power(dim), 0
    return main, power(dim - main)


def blocks(rows: int, dim: int, value_dim: int, itemsize: int, device: Device, *, shared_values: bool) -> Blocks | None:
    """Blocks for `rows` rows, or as many of them as fit `device`; `None` if not even 16 do."""
    # Keys that are converted, or come in two parts, take more registers: more of them at a time would spill.
    most = 16 if itemsize == 1 and dim > 256 else 32 if split(dim)[1] else 64
    for block_n, stages in ((64, 3), (32, 3), (32, 2), (16, 3), (16, 2)):
        if block_n > most:
            continue
        block_m = power(rows)
        while block_m > 16 and block_m * power(value_dim) > 128 * 128:  # the accumulator must stay in registers
            block_m //= 2
        found = Blocks(block_m, block_n, 4 if block_m * power(value_dim) <= 32 * 128 else 8, stages)
        if found.shared_memory(dim, value_dim, itemsize, shared_values=shared_values) <= device.shared_memory:
            return found
    return None


def why_not_form(form: AttentionForm, heads: int) -> str | None:
    """Why the kernels cannot compute `form` for `heads` query heads, or `None`."""
    if form.alibi is not None and form.alibi.heads != heads:
        return f"{form.alibi.heads} ALiBi slopes for {heads} query heads"
    if not math.isfinite(form.scale):
        return f"the scale must be finite, not {form.scale}"
    if form.softcap is not None and not form.softcap > 0:
        return f"the soft cap must be positive, not {form.softcap}"
    return None


def slopes(form: AttentionForm) -> jax.Array | None:
    """ALiBi's slopes as the kernels take them."""
    return None if form.alibi is None else form.alibi.values()


def constants(form: AttentionForm, dim: int, value_dim: int) -> dict[str, Any]:
    """The compile-time arguments that all the kernels share."""
    main, tail = split(dim)
    rounded = isinstance(form.alibi, RoundedAlibi)
    return {
        "D": dim,
        "D_MAIN": main,
        "D_TAIL": tail,
        "DV": value_dim,
        "DV_MAIN": power(value_dim),
        "SCALE": float(form.scale),
        "CAUSAL": form.causal,
        "WINDOW": form.window,
        "SOFTCAP": None if form.softcap is None else float(form.softcap),
        "ALIBI": None if form.alibi is None else "rounded" if rounded else "distance",
        "ALIBI_SCALE": form.alibi.scale if isinstance(form.alibi, RoundedAlibi) else 1.0,
    }
