"""KV memory: caches, and the attention-context protocol that the model is written against."""

from .cache import Cache, CacheSpec, KVShape, OneForAll, token_bytes
from .context import AttentionContext
from .contiguous import Contiguous, ContiguousContext
from .packed import PackedContext, RecordingContext
from .rows import join_rows
from .staged import StagedCache

__all__ = [
    "AttentionContext",
    "Cache",
    "CacheSpec",
    "Contiguous",
    "ContiguousContext",
    "KVShape",
    "OneForAll",
    "PackedContext",
    "RecordingContext",
    "StagedCache",
    "join_rows",
    "token_bytes",
]
