"""Checkpoints in and out: Hugging Face folders, PyTorch files, and our own Orbax folders."""

from .checkpoint import Checkpoint, open_checkpoint, resolve
from .config import parse_dtype
from .convert import ConversionReport, convert
from .huggingface import export_huggingface, parse_size
from .loader import load_model, load_parameters, load_spec
from .orbax import OrbaxCheckpoint
from .progress import Progress, ProgressBar
from .random_checkpoint import random_checkpoint
from .safetensors_file import SafetensorsWriter, TensorInfo
from .watch import NonFiniteWarning

__all__ = [
    "Checkpoint",
    "ConversionReport",
    "NonFiniteWarning",
    "OrbaxCheckpoint",
    "Progress",
    "ProgressBar",
    "SafetensorsWriter",
    "TensorInfo",
    "convert",
    "export_huggingface",
    "load_model",
    "load_parameters",
    "load_spec",
    "open_checkpoint",
    "parse_dtype",
    "parse_size",
    "random_checkpoint",
    "resolve",
]
