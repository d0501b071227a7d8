"""Attention of a batch that mixes prompt chunks and decodes over paged KV memory."""

from .api import RAGGED_PAGED_ATTENTION, ragged_paged_attention

__all__ = ["RAGGED_PAGED_ATTENTION", "ragged_paged_attention"]
