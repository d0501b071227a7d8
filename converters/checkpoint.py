"""Opening a checkpoint: a Hugging Face folder or hub id, or a folder of our own."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jdsi.errors import CheckpointError

from . import boxes, safetensors_file
from .boxes import Piece
from .buffers import OnBlock
from .config import read_config, read_json
from .location import resolve
from .manifest import MANIFEST
from .matching import some
from .orbax import OrbaxCheckpoint
from .safetensors_file import TensorInfo, read_header
from .sharded import FORMAT as SHARDED
from .sharded import ShardedCheckpoint
from .streaming import FORMAT as STREAMING
from .streaming import StreamingCheckpoint
from .torch_file import TorchFile
from .weight_files import WeightFiles


class Checkpoint:
    """A folder in the Hugging Face layout.

    Args:
        path: the folder.
        files: the weight files, where they are not those that the folder has for its config, see `WeightFiles`.

    Attributes:
        path: as given.
        files: the weight files.
        tensors: where every tensor of every file lies, by its name.

    Raises:
        CheckpointError: no weights, a damaged file, or an index that does not agree with the files.
    """

    def __init__(self, path: Path, files: Sequence[Path] | None = None) -> None:
        self.path = path
        self.label = str(path)
        self._torch: dict[Path, TorchFile] = {}
        if files is None:
            found = WeightFiles.of(path, read_config(path).get("transformers_weights"))
        else:
            found = WeightFiles(tuple(files))
        self.files, index = found.files, found.index
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            for name, info in self._open(file).items():
                owner = index.get(name)
                if owner is not None and owner != file.name:
                    continue
                if name in self.tensors:
                    other = self.tensors[name].file.name
                    raise CheckpointError(f"{self.label}: tensor {name!r} is in both {other} and {file.name}")
                self.tensors[name] = info
        if lost := [f"{name} in {file}" for name, file in index.items() if name not in self.tensors]:
            raise CheckpointError(f"{path}: the index names tensors that are not in their file: {some(lost)}")

    def _open(self, file: Path) -> dict[str, TensorInfo]:
        if file.suffix == ".safetensors":
            return read_header(file)[0]
        self._torch[file] = TorchFile(file)
        return self._torch[file].tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.nbytes for info in self.tensors.values())

    def read_boxes(self, info: TensorInfo, pieces: Iterable[Piece], *, on_block: OnBlock | None = None) -> None:
        """Read boxes of a tensor and nothing beside them; see `boxes.read_boxes`."""
        read = self._torch[info.file].read_boxes if info.file in self._torch else boxes.read_boxes
        read(info, pieces, on_block=on_block)

    def read_into(
        self,
        info: TensorInfo,
        out: np.ndarray,
        *,
        rows: tuple[int, int] | None = None,
        on_block: OnBlock | None = None,
    ) -> None:
        """Read a tensor or a range of its rows into `out`; see `safetensors_file.read_into`."""
        if info.file in self._torch:
            self._torch[info.file].read_into(info, out, rows=rows, on_block=on_block)
        else:
            safetensors_file.read_into(info, out, rows=rows, on_block=on_block)


OwnCheckpoint = OrbaxCheckpoint | StreamingCheckpoint | ShardedCheckpoint
"""Folders that hold parameters in our layout, under our names."""

AnyCheckpoint = Checkpoint | OwnCheckpoint
"""What `open_checkpoint` finds in a folder."""


def open_checkpoint(path_or_hub_id: str | Path) -> AnyCheckpoint:
    """Open a checkpoint and check that its files are whole; no weights are read yet.

    Args:
        path_or_hub_id: a folder with `config.json` and weights, in the Hugging Face layout or ours, or the name of a
            model on the Hugging Face Hub, which is downloaded into its cache.

    Raises:
        CheckpointError: nothing is there, it is damaged or unfinished, or the hub cannot be reached.

    Warns:
        JdsiWarning: the folder holds two sets of weights, or an adapter beside the model.
    """
    folder = resolve(path_or_hub_id)
    if (folder / MANIFEST).is_file():
        readers = {STREAMING: StreamingCheckpoint, SHARDED: ShardedCheckpoint}
        return readers.get(str(read_json(folder / MANIFEST).get("format")), OrbaxCheckpoint)(folder)
    return Checkpoint(folder)
