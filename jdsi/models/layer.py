"""A layer: sublayers and a residual, as data and as a module."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Self, TypeVar

import jax
from flax import nnx
from jax.typing import DTypeLike

from jdsi.errors import ConfigError
from jdsi.kv_cache import AttentionContext
from jdsi.layers import ArrayWeight, Norm, Sum, WeightForm, whole

from .norms import NormSpec, make_norm
from .residual import ResidualSpec
from .sublayer import Hidden, SublayerSpec

Kind = TypeVar("Kind", bound=SublayerSpec)


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One layer of the stack.

    Attributes:
        sublayers: in order, each with a name of its own; one of them attends to keys and values.
        residual: how they meet the residual stream.
        forms: of the weights that are not arrays, by their names in the layer ("attention.qkv.weight").
    """

    sublayers: tuple[SublayerSpec, ...]
    residual: ResidualSpec
    forms: tuple[tuple[str, WeightForm], ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"sublayers of a layer are called {', '.join(self.names)}; each needs a name of its own")
        if sum(one.kv_heads is not None for one in self.sublayers) != 1:
            raise ConfigError(f"of the sublayers {', '.join(self.names)} exactly one must attend to keys and values")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sublayers."""
        return tuple(one.name for one in self.sublayers)

    @property
    def norms(self) -> dict[str, NormSpec]:
        """The norms around them, by the names of their parameters in the layer."""
        return self.residual.norms(self.names)

    @property
    def kv_heads(self) -> tuple[int, int, int]:
        """`(num_kv_heads, key dim, value dim)`, what a layer's KV cache is made from."""
        return next(one.kv_heads for one in self.sublayers if one.kv_heads is not None)

    @property
    def causal(self) -> bool:
        """Whether no token depends on a later one."""
        return all(one.causal for one in self.sublayers)

    def of(self, kind: type[Kind]) -> Kind:
        """The sublayer of a kind, for those who know that there is one.

        Raises:
            LookupError: there is none.
        """
        for one in self.sublayers:
            if isinstance(one, kind):
                return one
        raise LookupError(f"of the sublayers {', '.join(self.names)} none is of the kind {kind.__name__}")

    def replaced(self, sublayer: SublayerSpec) -> Self:
        """The layer with another sublayer in place of the one of that name."""
        own = tuple(sublayer if one.name == sublayer.name else one for one in self.sublayers)
        return dataclasses.replace(self, sublayers=own)

    def share(self, ranks: int) -> Self:
        """What one of so many ranks of the axis "tensor" computes of it."""
        return dataclasses.replace(self, sublayers=tuple(one.share(ranks) for one in self.sublayers))


class Layer(nnx.Module):
    """The layer that a spec describes; its sublayers, and its residual's norms, are attributes by their names.

    Args:
        spec: what it is.
        width: E.
        index: of the layer in the contexts that it is given.
        dtype, rngs: of random weights.

    Raises:
        ConfigError: the spec has a form for something that is no matrix.
    """

    def __init__(self, spec: LayerSpec, width: int, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.residual, self.names = spec.residual, spec.names
        for one in spec.sublayers:
            setattr(self, one.name, one.build(width, index, dtype=dtype, rngs=rngs))
        self.norm_names = tuple(spec.norms)
        for name, norm in spec.norms.items():
            setattr(self, name, make_norm(norm, width, dtype))
        for path, form in spec.forms:
            *to, name = path.split(".")
            holder = functools.reduce(lambda module, part: getattr(module, part, None), to, self)
            matrix = getattr(holder, name, None)
            if not isinstance(matrix, ArrayWeight):
                raise ConfigError(f"forms has {path!r}, which is no matrix of sublayers {', '.join(self.names)}")
            setattr(holder, name, form.of(matrix))

    @property
    def norms(self) -> Mapping[str, Norm]:
        """See `Sublayers.norms`."""
        return {name: getattr(self, name) for name in self.norm_names}

    def run(self, name: str, x: Hidden, norm: Norm | None, context: AttentionContext) -> tuple[Sum, AttentionContext]:
        """See `Sublayers.run`."""
        with jax.named_scope(name):
            x, norm = whole(x, norm, context.positions.shape[0])
            added, context = getattr(self, name)(x, context, norm=norm)
        return added, context

    def __call__(self, x: Hidden, context: AttentionContext) -> tuple[Hidden, AttentionContext]:
        """The residual stream behind the layer, and the context that has seen the tokens."""
        return self.residual.run(self, x, context)
