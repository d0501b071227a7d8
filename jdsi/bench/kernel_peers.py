"""What others offer for the operators' arguments."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

# By operator and name; each takes the operator's arguments and gives its results, or raises `UnsupportedError`.
PEERS: Mapping[str, Mapping[str, Callable[..., Any]]] = MappingProxyType({})
