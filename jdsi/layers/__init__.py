"""The few building blocks every family is made of."""

from .activations import ACTIVATIONS
from .linear import Embedding, Linear
from .norm import LayerNorm, RMSNorm

__all__ = ["ACTIVATIONS", "Embedding", "LayerNorm", "Linear", "RMSNorm"]
