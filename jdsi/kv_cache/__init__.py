"""KV memory and the attention-context protocol."""

from .context import AttentionContext
from .contiguous import ContiguousContext
from .packed import PackedContext, RecordingContext

__all__ = ["AttentionContext", "ContiguousContext", "PackedContext", "RecordingContext"]
