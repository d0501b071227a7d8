"""Models as data: specs, the one Transformer that runs them, and the families."""

from .logical_axes import logical_axes, place
from .spec import TransformerSpec
from .transformer import Transformer, abstract_parameters, classified_tokens, parameters

__all__ = [
    "Transformer",
    "TransformerSpec",
    "abstract_parameters",
    "classified_tokens",
    "logical_axes",
    "parameters",
    "place",
]
