"""The `jdsi` command."""

from .app import main

__all__ = ["main"]
