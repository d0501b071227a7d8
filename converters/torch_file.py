"""PyTorch's `.bin` and `.pt` files, read without executing anything they hold."""

import abc
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jdsi.errors import CheckpointError

from .boxes import Piece
from .buffers import OnBlock, check_cast, copy_blocks
from .mistaken import refuse_pointer
from .safetensors_file import TensorInfo


class StateDict(abc.ABC):
    """Named PyTorch tensors, read as those of a safetensors file are.

    Attributes:
        tensors: name to type and shape.
    """

    tensors: dict[str, TensorInfo]

    @abc.abstractmethod
    def _array(self, name: str) -> np.ndarray:
        """A tensor's values in host memory, which are not written to."""

    def read_into(
        self,
        info: TensorInfo,
        out: np.ndarray,
        *,
        rows: tuple[int, int] | None = None,
        on_block: OnBlock | None = None,
    ) -> None:
        """Copy a tensor or a range of its rows into `out`, casting on the way; as `safetensors_file.read_into`."""
        check_cast(info.dtype, out.dtype, info.where)
        array = self._array(info.name)
        array = array if rows is None else array[slice(*rows)]
        if out.shape != array.shape:
            raise ValueError(f"an array of shape {array.shape} is needed for {info.where}, not {out.shape}")
        if not out.size:
            return
        if not out.shape:
            array, out = array.reshape(1), out.reshape(1)
        copy_blocks(out, array, on_block)

    def read_boxes(self, info: TensorInfo, pieces: Iterable[Piece], *, on_block: OnBlock | None = None) -> None:
        """Copy boxes of a tensor, as `boxes.read_boxes`; of a mapped file, only the pages they lie on are read."""
        array = self._array(info.name)
        for box, target in pieces:
            check_cast(info.dtype, target.dtype, info.where)
            copy_blocks(target, array[box], on_block)


class TorchFile(StateDict):
    """A state dict on disk.

    Only `torch.load(weights_only=True)` opens it, which builds tensors and plain containers and refuses to call
    anything else. The tensors stay memory-mapped, except in files of before PyTorch 1.6, which are read whole.

    Raises:
        CheckpointError: torch is not installed, or the file is damaged, unsafe or not a flat dict of tensors.
    """

    def __init__(self, path: Path) -> None:
        try:
            import torch
        except ImportError as error:
            raise CheckpointError(
                f"{path}: reading .bin and .pt files needs PyTorch: pip install 'jdsi[torch]' (or convert the "
                "checkpoint to safetensors on a machine that has it)"
            ) from error
        refuse_pointer(path)
        try:
            mapped = zipfile.is_zipfile(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path}: refused, it is damaged or holds more than tensors and loading it could run code: "
                f"{str(error).splitlines()[0]}"
            ) from error
        except Exception as error:  # whatever torch makes of a damaged file
            raise CheckpointError(f"{path}: not a readable PyTorch file: {error}") from error
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a dict from names to tensors")
        if odd := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
            shown = ", ".join(f"{name!r} ({type(state[name]).__name__})" for name in odd[:20])
            raise CheckpointError(
                f"{path}: not a flat dict of tensors, {len(odd)} entries are something else: {shown}; save the "
                "model's state_dict() alone"
            )
        self._arrays: dict[str, np.ndarray] = {name: as_numpy(path, name, value) for name, value in state.items()}
        self.tensors: dict[str, TensorInfo] = {
            name: TensorInfo(name, array.dtype, array.shape, path) for name, array in self._arrays.items()
        }

    def _array(self, name: str) -> np.ndarray:
        return self._arrays[name]


def as_numpy(path: Path, name: str, tensor: Any) -> np.ndarray:
    """The values of a tensor on the CPU, not copied.

    Args:
        path, name: where it is and what it is called, for messages.
        tensor: PyTorch's.

    Raises:
        CheckpointError: its type has no counterpart.
    """
    import torch

    narrow = {
        torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
        torch.float8_e4m3fn: (torch.int8, ml_dtypes.float8_e4m3fn),
        torch.float8_e5m2: (torch.int8, ml_dtypes.float8_e5m2),
    }
    try:
        if tensor.dtype in narrow:
            same_width, dtype = narrow[tensor.dtype]
            return tensor.detach().view(same_width).numpy().view(dtype)
        return tensor.detach().numpy()
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: tensor {name!r} of type {tensor.dtype} cannot be read: {error}") from error
