"""What one device holds of a model: its layers, and its part of each."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping

from jax.typing import DTypeLike

from jdsi.models import ParameterInfo, TransformerSpec, parameters_of
from jdsi.models.tensor_parallel import local_spec
from jdsi.sharding.schedule import split_layers

_TABLE = "embedding.tokens.weight"


@dataclasses.dataclass(frozen=True)
class Share:
    """One rank's part of a model, the same for all ranks: smaller parts are padded.

    Attributes:
        spec: the model as that rank computes it.
        parameters: its own, by name.
    """

    spec: TransformerSpec
    parameters: Mapping[str, ParameterInfo]

    @property
    def table(self) -> list[ParameterInfo]:
        """The parameter outside the head that a tied head multiplies with, if it is tied."""
        return [self.parameters[_TABLE]] if self.spec.head is not None and self.spec.head.tied else []

    def stage(self, layers: range) -> list[ParameterInfo]:
        """The parameters that a stage with these layers holds."""
        first, last = layers.start == 0, layers.stop == len(self.spec.layers)

        def here(info: ParameterInfo) -> bool:
            if info.layer is not None:
                return info.layer in layers
            return first if info.group == "embedding" else last

        held = [info for info in self.parameters.values() if here(info)]
        # The last stage has a copy of its own of a table that both ends use.
        return [*held, *self.table] if last and not first else held


@functools.lru_cache(maxsize=128)
def share_of(spec: TransformerSpec, ranks: int) -> Share:
    """The share of each of `ranks` tensor-parallel ranks."""
    local = local_spec(spec, ranks)
    return Share(local, parameters_of(local))


@functools.lru_cache(maxsize=128)
def even_stages(spec: TransformerSpec, stages: int) -> tuple[range, ...]:
    """The layers of each stage, such that all stages read about the same number of weights for a step.

    Raises:
        ConfigError: there are more stages than layers.
    """
    share, layers = share_of(spec, 1), [0] * len(spec.layers)
    for info in share.parameters.values():
        if info.layer is not None:
            layers[info.layer] += elements([info])
    head = [info for info in share.parameters.values() if info.group == "head"]
    return tuple(split_layers(layers, stages, last=elements([*head, *share.table])))


def elements(infos: Iterable[ParameterInfo]) -> int:
    """How many numbers parameters hold."""
    return sum(math.prod(info.shape) for info in infos)


def weight_bytes(infos: Iterable[ParameterInfo], dtype: DTypeLike) -> int:
    """Bytes of parameters in a model that runs in `dtype`."""
    return sum(math.prod(info.shape) * info.dtype_in(dtype).itemsize for info in infos)


def parameter_count(spec: TransformerSpec) -> int:
    """How many parameters a model has."""
    return elements(parameters_of(spec).values())
