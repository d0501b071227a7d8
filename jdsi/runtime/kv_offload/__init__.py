"""Keys and values that live in host memory or on disk, and come to the devices layer by layer."""

from .context import Offloaded, OffloadedCache
from .memory import OffloadedKV
from .slabs import FileSlabs, HostSlabs, SlabHome
from .store import SlabReport, SlabStore

__all__ = [
    "FileSlabs",
    "HostSlabs",
    "Offloaded",
    "OffloadedCache",
    "OffloadedKV",
    "SlabHome",
    "SlabReport",
    "SlabStore",
]
