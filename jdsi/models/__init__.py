"""Models as data: specs, the one Transformer that runs them, and the families."""

from .logical_axes import logical_axes, place
from .spec import TransformerSpec
from .transformer import Transformer, abstract_parameters, parameters

__all__ = ["Transformer", "TransformerSpec", "abstract_parameters", "logical_axes", "parameters", "place"]
