"""Executors: where weights live and how steps run."""

from .compilation_cache import compilation_counts, enable_compilation_cache
from .epilogue import Epilogue
from .executor import Executor, Step
from .resident import ResidentExecutor
from .shapes import batch_bucket, token_bucket
from .stats import GenerationStats

__all__ = [
    "Epilogue",
    "Executor",
    "GenerationStats",
    "ResidentExecutor",
    "Step",
    "batch_bucket",
    "compilation_counts",
    "enable_compilation_cache",
    "token_bucket",
]
