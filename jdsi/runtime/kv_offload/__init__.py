"""Keys and values that live in host memory or on disk, and come to the devices layer by layer."""

from .context import OffloadedContext
from .memory import OffloadedKV
from .slabs import FileSlabs, HostSlabs, SlabHome
from .store import SlabReport, SlabStore

__all__ = ["FileSlabs", "HostSlabs", "OffloadedContext", "OffloadedKV", "SlabHome", "SlabReport", "SlabStore"]
