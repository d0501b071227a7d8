"""Attention of few new tokens to long memories of keys and values, contiguous or paged, quantised or not."""

from .api import DECODE_ATTENTION, PAGED_DECODE_ATTENTION, decode_attention, paged_decode_attention

__all__ = ["DECODE_ATTENTION", "PAGED_DECODE_ATTENTION", "decode_attention", "paged_decode_attention"]
