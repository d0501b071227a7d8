"""What one device holds of a model: its layers, and its part of each."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping

from jdsi.models import ParameterInfo, TransformerSpec, parameters_of
from jdsi.models.tensor_parallel import local_spec
from jdsi.sharding.schedule import split_layers

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Share:
    """One rank's part of every layer, the same for all ranks: smaller parts are padded.

    Attributes:
        spec: the model as that rank computes it.
        layers: of each layer the shapes of its parameters, by name within the layer.
        others: shapes of the parameters outside the layers, by name.
        groups: of those, see `ParameterInfo`.
    """

    spec: TransformerSpec
    layers: tuple[Shapes, ...]
    others: Shapes
    groups: Mapping[str, str]

    @property
    def table(self) -> str | None:
        """The parameter outside the head that a tied head multiplies with."""
        return "embedding.tokens.weight" if self.spec.head is not None and self.spec.head.tied else None

    def stage(self, layers: range) -> list[tuple[int, ...]]:
        """Shapes of the parameters that a stage with these layers holds."""
        first, last = layers.start == 0, layers.stop == len(self.layers)
        shapes = [shape for i in layers for shape in self.layers[i].values()]
        for name, shape in self.others.items():
            if first if self.groups[name] == "embedding" else last:
                shapes.append(shape)
        # The last stage has a copy of its own of a table that both ends use.
        return [*shapes, self.others[self.table]] if last and not first and self.table else shapes


@functools.lru_cache(maxsize=128)
def share_of(spec: TransformerSpec, ranks: int) -> Share:
    """The share of each of `ranks` tensor-parallel ranks."""
    local = local_spec(spec, ranks)
    layers: list[dict[str, tuple[int, ...]]] = [{} for _ in local.layers]
    others: dict[str, ParameterInfo] = {}
    for name, info in parameters_of(local).items():
        if info.layer is None:
            others[name] = info
        else:
            layers[info.layer][info.inner] = info.shape
    shapes, groups = ({name: getattr(info, one) for name, info in others.items()} for one in ("shape", "group"))
    return Share(local, tuple(layers), shapes, groups)


@functools.lru_cache(maxsize=128)
def even_stages(spec: TransformerSpec, stages: int) -> tuple[range, ...]:
    """The layers of each stage, such that all stages read about the same number of weights for a step.

    Raises:
        ConfigError: there are more stages than layers.
    """
    share = share_of(spec, 1)
    head = [shape for name, shape in share.others.items() if share.groups[name] == "head"]
    head += [share.others[share.table]] if share.table else []
    layers = [elements(layer.values()) for layer in share.layers]
    return tuple(split_layers(layers, stages, last=elements(head)))


def elements(shapes: Iterable[tuple[int, ...]]) -> int:
    """How many numbers arrays of these shapes hold."""
    return sum(map(math.prod, shapes))


def parameter_count(spec: TransformerSpec) -> int:
    """How many parameters a model has."""
    share = share_of(spec, 1)
    return elements(share.stage(range(len(share.layers))))
