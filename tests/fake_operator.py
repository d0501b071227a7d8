"""An operator made up for tests, with kernels in plain JAX that run anywhere: correct, wrong and broken ones."""

import itertools
import sys
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jdsi.pallas_kernels import registry
from jdsi.pallas_kernels.device import Device
from jdsi.pallas_kernels.operator import ArgumentSpec, Operator

_number = itertools.count()


def reference(x: jax.Array, cache: jax.Array, *, power: int) -> tuple[jax.Array, jax.Array]:
    """A result of its own, and the cache with its first row written."""
    y = x**power
    return y, cache.at[0].set(y)


def kernel(
    offset: float = 0.0, *, skips_write: bool = False, fails: str | None = None, why_not: str | None = None
) -> types.SimpleNamespace:
    """A kernel module whose results are off by `offset` and by what its configuration says."""

    def run(x: jax.Array, cache: jax.Array, *, device: Device, config: Any, power: int) -> Any:
        if fails:
            raise RuntimeError(fails)
        y, written = reference(x, cache, power=power)
        return y + offset + (config or {}).get("wrong", 0), cache if skips_write else written

    def candidates(x: jax.Array, cache: jax.Array, *, device: Device, power: int) -> Sequence[dict[str, Any]]:
        return [{"block": 8}, {"block": 16}, {"block": 16, "wrong": 1}]

    return types.SimpleNamespace(why_not=lambda *_, **__: why_not, run=run, candidates=candidates)


def specs(dtype: str = "float32", sizes: Sequence[int] = (4, 6), bytes: int | None = None) -> tuple[ArgumentSpec, ...]:
    """Arguments of several widths."""

    def make(width: int) -> Any:
        def arrays(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            a, b = jax.random.split(key)
            return jax.random.normal(a, (width,), jnp.dtype(dtype)), jax.random.normal(b, (50, width), jnp.dtype(dtype))

        return arrays

    return tuple(
        ArgumentSpec(f"toy n={n} {dtype}", make(n), bytes or 12 * n, 2 * n, {"power": 2}, in_place=(1,)) for n in sizes
    )


def bucket(x: jax.Array, cache: jax.Array, *, power: int) -> str:
    """Widths up to 6 share a tuning."""
    return "small" if x.size <= 6 else "large"


def register(monkeypatch: pytest.MonkeyPatch, arguments: Sequence[ArgumentSpec], **kernels: Any) -> Operator:
    """Makes `cube` with these kernels the only operator there is."""
    package = f"made_up_{next(_number)}"  # operators remember what they traced
    modules = {f"{package}.{name}": module for name, module in kernels.items()}
    operator = Operator("cube", package, reference, bucket, tuple(kernels))  # pyright: ignore[reportArgumentType]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    entry = types.SimpleNamespace(operator=operator, argument_specs=lambda: tuple(arguments))
    monkeypatch.setattr(registry, "operators", lambda: {"cube": entry})
    return operator
