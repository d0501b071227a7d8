"""Attention of many queries: prompts, packed batches, continuations."""

from .api import PREFILL_ATTENTION, prefill_attention

__all__ = ["PREFILL_ATTENTION", "prefill_attention"]
