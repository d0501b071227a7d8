"""The few building blocks every family is made of."""

from .linear import Embedding, Linear
from .norm import Norm

__all__ = ["Embedding", "Linear", "Norm"]
