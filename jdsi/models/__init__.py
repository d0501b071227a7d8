"""Models as data: specs, the one Transformer that runs them, and the families."""

from .abstract import abstract_parameters, groups_of, parameters_of, shapes_of, splits_of
from .heads import classified_tokens
from .parameters import ParameterInfo, Skeleton, layer_group, parameters
from .part import Part
from .spec import TransformerSpec
from .transformer import Transformer

__all__ = [
    "ParameterInfo",
    "Part",
    "Skeleton",
    "Transformer",
    "TransformerSpec",
    "abstract_parameters",
    "classified_tokens",
    "groups_of",
    "layer_group",
    "parameters",
    "parameters_of",
    "shapes_of",
    "splits_of",
]
