"""What one layer's attention computes, and the reference that computes every form of it."""

from .form import Alibi, AttentionForm, RoundedAlibi
from .reference import attention, attention_weights

__all__ = ["Alibi", "AttentionForm", "RoundedAlibi", "attention", "attention_weights"]
