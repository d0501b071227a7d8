"""A residual of one's own: what all sublayers add is halved, and passes a norm at the layer's end."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jdsi.layers import row_parallel
from jdsi.models.spec import NormSpec, ResidualSpec
from seams import LAYER, NORM, PlainModel, Toy, small_spec


@dataclasses.dataclass(frozen=True)
class HalfSteps(ResidualSpec):
    norm: NormSpec

    def norms(self, names: Sequence[str]) -> dict[str, NormSpec]:
        return {"last_norm": self.norm}

    def run(self, layer: Any, x: Any, context: Any) -> Any:
        for name in layer.names:
            added, context = layer.run(name, x, None, context)
            x = x + 0.5 * row_parallel([added], x.shape[0])
        return layer.norms["last_norm"](x), context

    def exchanges(self, sublayers: int) -> int:
        return sublayers

    def separate_norms(self, sublayers: int, *, divided: bool) -> int:
        return 1


class Plain(PlainModel):
    def layer(self, at: str, x: np.ndarray) -> np.ndarray:
        x = x + 0.5 * self.attention(at, x)
        return self.norm(f"{at}.last_norm", x + 0.5 * self.feed_forward(at, x))


TOY = Toy(small_spec(dataclasses.replace(LAYER, residual=HalfSteps(NORM))), Plain)
