"""KV memory and the attention-context protocol."""

from .context import AttentionContext
from .contiguous import ContiguousContext
from .packed import PackedContext, RecordingContext
from .rows import join_rows

__all__ = ["AttentionContext", "ContiguousContext", "PackedContext", "RecordingContext", "join_rows"]
