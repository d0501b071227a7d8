"""A sublayer of two experts with a router, its hidden units divided over "tensor"."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdsi.layers import WIDTH, Axis, Combined, Linear, parameter
from jdsi.models.spec import SublayerSpec
from jdsi.models.work import Operation, Work
from jdsi.sharding import Evenly
from seams import LAYER, PlainModel, Toy, small_spec


@dataclasses.dataclass(frozen=True)
class TwoExpertsSpec(SublayerSpec):
    name = "feed_forward"
    width: int

    def build(self, width: int, layer: int, **made: Any) -> "TwoExperts":
        return TwoExperts(self.width, width, **made)

    def share(self, ranks: int) -> Self:
        return dataclasses.replace(self, width=Evenly(self.width).among(ranks, 0).size)

    def work(self, width: int, work: Work) -> Iterator[Operation]:
        yield work.product("experts", 4 * self.width, width, bias=False, tokens=work.load.tokens)

    def live(self, width: int) -> int:
        return 4 * self.width


class TwoExperts(nnx.Module):
    def __init__(self, hidden: int, width: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        units, random = Axis("feed_forward", Evenly(hidden)), jax.random.normal
        self.router = Linear(width, 2, bias=False, dtype=dtype, rngs=rngs)
        self.up = parameter(0.02 * random(rngs.params(), (2, hidden, width), dtype), (None, units, WIDTH))
        self.down = parameter(0.02 * random(rngs.params(), (2, width, hidden), dtype), (None, WIDTH, units))

    def __call__(self, x: Any, context: Any, *, norm: Any = None) -> Any:
        x = x if norm is None else norm(x)
        chances = jax.nn.softmax(self.router(x))
        chosen = chances * (chances == chances.max(axis=1, keepdims=True))
        hidden = jax.nn.relu(jnp.einsum("te,xfe->txf", x, self.up[...]))
        return Combined(jnp.einsum("tx,txf,xef->te", chosen, hidden, self.down[...])), context


class Plain(PlainModel):
    def feed_forward(self, at: str, x: np.ndarray) -> np.ndarray:
        router, up, down = (self.arrays[f"{at}.feed_forward.{n}"] for n in ("router.weight", "up", "down"))
        chances = np.exp(x @ router.T) / np.exp(x @ router.T).sum(axis=1, keepdims=True)
        best = zip(x, chances.argmax(axis=1), chances.max(axis=1), strict=True)
        return np.stack([chance * (down[one] @ np.maximum(up[one] @ row, 0)) for row, one, chance in best])


TOY = Toy(small_spec(LAYER.replaced(TwoExpertsSpec(40))), Plain)
