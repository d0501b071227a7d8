"""Checkpoints in and out: Hugging Face folders, PyTorch files, and folders of our own."""

from .checkpoint import Checkpoint, open_checkpoint
from .config import parse_dtype, resolve_dtype
from .convert import convert
from .huggingface import export_huggingface, parse_size
from .loader import load_model, load_parameters
from .location import resolve
from .orbax import OrbaxCheckpoint
from .progress import Progress, ProgressBar
from .random_checkpoint import random_checkpoint
from .safetensors_file import SafetensorsWriter, TensorInfo
from .save import ConversionReport, save_parameters
from .sharded import ShardedCheckpoint
from .sharded_loader import abstract_shares, from_arrays, load_sharded
from .sharded_parameters import ShardedParameters
from .sources import MemoryParameters, ParameterSource
from .stored_model import StoredModel, load_spec, open_model
from .watch import NonFiniteWarning

__all__ = [
    "Checkpoint",
    "ConversionReport",
    "MemoryParameters",
    "NonFiniteWarning",
    "OrbaxCheckpoint",
    "ParameterSource",
    "Progress",
    "ProgressBar",
    "SafetensorsWriter",
    "ShardedCheckpoint",
    "ShardedParameters",
    "StoredModel",
    "TensorInfo",
    "abstract_shares",
    "convert",
    "export_huggingface",
    "from_arrays",
    "load_model",
    "load_parameters",
    "load_sharded",
    "load_spec",
    "open_checkpoint",
    "open_model",
    "parse_dtype",
    "parse_size",
    "random_checkpoint",
    "resolve",
    "resolve_dtype",
    "save_parameters",
]
