"""Rotary embedding of q and k together with the write of k and v into the KV memory."""

from .api import rotary_kv_write, rotary_kv_write_fused

__all__ = ["rotary_kv_write", "rotary_kv_write_fused"]
