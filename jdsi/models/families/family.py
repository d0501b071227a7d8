"""What a family is: a name, a reader of its Hugging Face config, and its checkpoint's name table."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jdsi.models.spec import TransformerSpec
from jdsi.models.weight_map import WeightMap


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        model_type: `model_type` in `config.json`.
        spec: turns a `transformers` config object into a spec; raises `ConfigError` for what it cannot honour.
        weight_map: the checkpoint table of a spec that `spec` made.
    """

    model_type: str
    spec: Callable[[Any], TransformerSpec]
    weight_map: Callable[[TransformerSpec], WeightMap]
