"""The ways families wire sublayers to the residual stream; none knows what the sublayers are."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from jdsi.kv_cache import AttentionContext
from jdsi.layers import Norm, Sum, row_parallel, whole

from .norms import NormSpec
from .sublayer import Hidden


class Sublayers(Protocol):
    """What a residual sees of its layer.

    Attributes:
        names: of the sublayers, in order.
        norms: those that the residual asked for, by name.
    """

    names: tuple[str, ...]

    @property
    def norms(self) -> Mapping[str, Norm]: ...

    def run(self, name: str, x: Hidden, norm: Norm | None, context: AttentionContext) -> tuple[Sum, AttentionContext]:
        """What a sublayer adds for `norm(x)`; of divided tokens `x` may be those of the rank or, gathered, all."""
        ...


class ResidualSpec(abc.ABC):
    """How a layer's sublayers meet the residual stream: a frozen dataclass.

    Inside `jax.shard_map` each rank of "tensor" may hold its own part of the stream's tokens.
    """

    @abc.abstractmethod
    def norms(self, names: Sequence[str]) -> dict[str, NormSpec]:
        """The norms of a layer with such sublayers, by the names of their parameters in the layer."""

    @abc.abstractmethod
    def run(self, layer: Sublayers, x: Hidden, context: AttentionContext) -> tuple[Hidden, AttentionContext]:
        """The layer: the residual stream behind it, and the context that has seen the tokens."""

    @abc.abstractmethod
    def exchanges(self, sublayers: int) -> int:
        """How often the ranks of a layer add up what they computed, and gather tokens that are divided over them."""

    @abc.abstractmethod
    def separate_norms(self, sublayers: int, *, divided: bool) -> int:
        """How many norms are not part of a product, where tokens are divided over ranks or not."""


@dataclasses.dataclass(frozen=True)
class PreNorm(ResidualSpec):
    """For each sublayer, `x += sublayer(norm(x))`; with `from_norm`, the norm's output is the residual."""

    norm: NormSpec
    from_norm: bool = False

    def norms(self, names: Sequence[str]) -> dict[str, NormSpec]:
        """See `ResidualSpec.norms`."""
        return {f"{name}_norm": self.norm for name in names}

    def run(self, layer: Sublayers, x: Hidden, context: AttentionContext) -> tuple[Hidden, AttentionContext]:
        """See `ResidualSpec.run`."""
        rows = x.shape[0]
        for name in layer.names:
            norm: Norm | None = layer.norms[f"{name}_norm"]
            if self.from_norm:
                x, norm = norm(x), None
            added, context = layer.run(name, x, norm, context)
            x = row_parallel([added], rows, residual=x)
        return x, context

    def exchanges(self, sublayers: int) -> int:
        """See `ResidualSpec.exchanges`."""
        return sublayers

    def separate_norms(self, sublayers: int, *, divided: bool) -> int:
        """See `ResidualSpec.separate_norms`."""
        return sublayers if divided or self.from_norm else 0


@dataclasses.dataclass(frozen=True)
class PostNorm(ResidualSpec):
    """For each sublayer, `x = norm(x + sublayer(x))`."""

    norm: NormSpec

    def norms(self, names: Sequence[str]) -> dict[str, NormSpec]:
        """See `ResidualSpec.norms`."""
        return {f"{name}_norm": self.norm for name in names}

    def run(self, layer: Sublayers, x: Hidden, context: AttentionContext) -> tuple[Hidden, AttentionContext]:
        """See `ResidualSpec.run`."""
        rows = x.shape[0]
        for name in layer.names:
            added, context = layer.run(name, x, None, context)
            x = layer.norms[f"{name}_norm"](row_parallel([added], rows, residual=x))
        return x, context

    def exchanges(self, sublayers: int) -> int:
        """See `ResidualSpec.exchanges`."""
        return sublayers

    def separate_norms(self, sublayers: int, *, divided: bool) -> int:
        """See `ResidualSpec.separate_norms`."""
        return sublayers


@dataclasses.dataclass(frozen=True)
class SandwichNorm(ResidualSpec):
    """For each sublayer, `x += norm'(sublayer(norm(x)))`."""

    norm: NormSpec

    def norms(self, names: Sequence[str]) -> dict[str, NormSpec]:
        """See `ResidualSpec.norms`."""
        return {f"{name}{place}": self.norm for name in names for place in ("_norm", "_out_norm")}

    def run(self, layer: Sublayers, x: Hidden, context: AttentionContext) -> tuple[Hidden, AttentionContext]:
        """See `ResidualSpec.run`."""
        rows = x.shape[0]
        for name in layer.names:
            added, context = layer.run(name, x, layer.norms[f"{name}_norm"], context)
            x = x + layer.norms[f"{name}_out_norm"](row_parallel([added], rows))
        return x, context

    def exchanges(self, sublayers: int) -> int:
        """See `ResidualSpec.exchanges`."""
        return sublayers

    def separate_norms(self, sublayers: int, *, divided: bool) -> int:
        """See `ResidualSpec.separate_norms`."""
        return 2 * sublayers if divided else sublayers


@dataclasses.dataclass(frozen=True)
class ParallelResidual(ResidualSpec):
    """`x += sum of sublayer(norm(x))`, each with its norm; with `shared_norm`, all read the first one's."""

    norm: NormSpec
    shared_norm: bool = False

    def norms(self, names: Sequence[str]) -> dict[str, NormSpec]:
        """See `ResidualSpec.norms`."""
        return {f"{name}_norm": self.norm for name in names[: 1 if self.shared_norm else None]}

    def run(self, layer: Sublayers, x: Hidden, context: AttentionContext) -> tuple[Hidden, AttentionContext]:
        """See `ResidualSpec.run`."""
        tokens, norms = context.positions.shape[0], list(layer.norms.values())
        # Gathered once for all: with a norm of their own each, before the norms.
        if self.shared_norm:
            gathered, norm = whole(x, norms[0], tokens)
            own = [norm] * len(layer.names)
        else:
            gathered, own = whole(x, None, tokens)[0], norms
        sums = []
        for name, norm in zip(layer.names, own, strict=True):
            added, context = layer.run(name, gathered, norm, context)
            sums.append(added)
        return row_parallel(sums, x.shape[0], residual=x), context

    def exchanges(self, sublayers: int) -> int:
        """See `ResidualSpec.exchanges`."""
        return 1

    def separate_norms(self, sublayers: int, *, divided: bool) -> int:
        """See `ResidualSpec.separate_norms`."""
        return 1 if divided else 0
