"""Models as data: specs, the one Transformer that runs them, and the families."""

from .heads import classified_tokens
from .logical_axes import logical_axes, place
from .part import Part
from .spec import TransformerSpec
from .transformer import Skeleton, Transformer, abstract_parameters, parameters

__all__ = [
    "Part",
    "Skeleton",
    "Transformer",
    "TransformerSpec",
    "abstract_parameters",
    "classified_tokens",
    "logical_axes",
    "parameters",
    "place",
]
