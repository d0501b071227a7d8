"""Opening a checkpoint: a Hugging Face folder or hub id, or a folder of our own."""

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdsi.errors import CheckpointError
from jdsi.models.weight_map import Shape, WeightMap

from . import boxes, safetensors_file
from .boxes import Piece
from .buffers import OnBlock
from .config import COMPANIONS, load_config, read_config, read_json
from .manifest import MANIFEST
from .orbax import OrbaxCheckpoint
from .safetensors_file import TensorInfo, read_header
from .sharded import FORMAT as SHARDED
from .sharded import ShardedCheckpoint
from .sources import MappedParameters, ParameterSource
from .streaming import FORMAT as STREAMING
from .streaming import StreamingCheckpoint
from .torch_file import TorchFile

PARTIAL = re.compile(r".*\.partial-[0-9a-f]{8}")
"""Names of folders that a conversion is still writing, or left when it was killed."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state|adapter_model).*")
_SHOWN = 20


class Checkpoint:
    """A folder in the Hugging Face layout; safetensors files are preferred over PyTorch's.

    Attributes:
        path: the folder.
        files: the weight files.
        tensors: where every tensor of every file lies, by its name.

    Raises:
        CheckpointError: no weights, a damaged file, or an index that does not agree with the files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = str(path)
        self._torch: dict[Path, TorchFile] = {}
        self.files, index = _weight_files(path)
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            for name, info in self._open(file).items():
                owner = index.get(name)
                if owner is not None and owner != file.name:
                    continue
                if name in self.tensors:
                    other = self.tensors[name].file.name
                    raise CheckpointError(f"{path}: tensor {name!r} is in both {other} and {file.name}")
                self.tensors[name] = info
        if lost := [f"{name} in {file}" for name, file in index.items() if name not in self.tensors]:
            raise CheckpointError(f"{path}: the index names tensors that are not in their file: {_some(lost)}")

    def _open(self, file: Path) -> dict[str, TensorInfo]:
        if file.suffix == ".safetensors":
            return read_header(file)[0]
        self._torch[file] = TorchFile(file)
        return self._torch[file].tensors

    @functools.cached_property
    def config(self) -> Any:
        """The `transformers` config object; see `load_config`."""
        return load_config(self.path)

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


AnyCheckpoint = Checkpoint | OrbaxCheckpoint | StreamingCheckpoint | ShardedCheckpoint
"""What `open_checkpoint` finds in a folder."""


def open_checkpoint(path_or_hub_id: str | Path) -> AnyCheckpoint:
    """Open a checkpoint and check that its files are whole; no weights are read yet.

    Args:
        path_or_hub_id: a folder with `config.json` and weights, in the Hugging Face layout or ours, or the name of a
            model on the Hugging Face Hub, which is downloaded into its cache.

    Raises:
        CheckpointError: nothing is there, it is damaged or unfinished, or the hub cannot be reached.
    """
    folder = resolve(path_or_hub_id)
    if (folder / MANIFEST).is_file():
        readers = {STREAMING: StreamingCheckpoint, SHARDED: ShardedCheckpoint}
        return readers.get(str(read_json(folder / MANIFEST).get("format")), OrbaxCheckpoint)(folder)
    read_config(folder)
    return Checkpoint(folder)


def parameters_of(checkpoint: AnyCheckpoint, weight_map: WeightMap, shapes: Mapping[str, Shape]) -> ParameterSource:
    """The parameters of a checkpoint in our layout.

    Args:
        checkpoint: from `open_checkpoint`.
        weight_map: the family's table; unused for our own folders.
        shapes: of every parameter of the model, by dotted path.

    Raises:
        CheckpointError: it does not hold exactly these.
    """
    if isinstance(checkpoint, Checkpoint):
        return MappedParameters(checkpoint, weight_map, shapes)
    checkpoint.check(shapes)
    return checkpoint


def resolve(path_or_hub_id: str | Path) -> Path:
    """The local folder of a checkpoint, downloaded if need be; errors as `open_checkpoint`."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        if PARTIAL.fullmatch(path.absolute().name):
            raise CheckpointError(f"{path}: a conversion that did not finish; convert again")
        if not any(path.iterdir()):
            raise CheckpointError(f"{path}: the folder is empty")
        return path
    if path.exists():
        raise CheckpointError(f"{path}: a file; give the folder that holds config.json and the weights")
    if not _HUB_ID.fullmatch(str(path_or_hub_id)):
        raise CheckpointError(f"{path}: no such folder")
    return _download(str(path_or_hub_id))


def resolve_config(path_or_hub_id: str | Path) -> Path:
    """A config file, or the folder of one; of a hub id nothing but the config is downloaded. Errors as `resolve`."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_file() and path.suffix == ".json":
        return path
    if path.exists() or not _HUB_ID.fullmatch(str(path_or_hub_id)):
        return resolve(path)
    return _download(str(path_or_hub_id), weights=False)


def _download(hub_id: str, *, weights: bool = True) -> Path:
    from huggingface_hub import snapshot_download

    try:
        small = ["config.json", *COMPANIONS]
        if not weights:
            return Path(snapshot_download(hub_id, allow_patterns=small))
        folder = Path(snapshot_download(hub_id, allow_patterns=[*small, "model*.safetensors", "model*.index.json"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(hub_id, allow_patterns=["pytorch_model*.bin", "pytorch_model*.index.json"]))
    except Exception as error:  # network, authentication, naming: each has types of its own
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(
            f"{hub_id}: no such folder here, and it cannot be fetched from the Hugging Face Hub: {reason}"
        ) from error
    return folder


def _weight_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files to read, and the index's tensor-to-file table (empty without an index)."""
    for suffix, single in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        index = path / f"{single}.index.json"
        if index.is_file():
            table = _read_index(index)
            return [path / name for name in sorted(set(table.values()))], table
        if (path / single).is_file():
            return [path / single], {}
        # Weights under another name, or shards that lost their index.
        suffixes = {".bin", ".pt", ".pth"} if suffix == "bin" else {".safetensors"}
        found = [f for f in sorted(path.iterdir()) if f.suffix in suffixes and not _NOT_WEIGHTS.fullmatch(f.name)]
        if found:
            return found, {}
    raise CheckpointError(f"{path}: no weights: neither *.safetensors nor *.bin files")


def _read_index(index: Path) -> dict[str, str]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(file, str) for file in table.values()):
        raise CheckpointError(f"{index}: 'weight_map' must be an object from tensor names to file names")
    files = set(table.values())
    # A bare file name only: an index must not make us read outside its own folder.
    if outside := sorted(f for f in files if f != Path(f).name or "\\" in f or "\0" in f or f in ("", ".", "..")):
        raise CheckpointError(f"{index}: shards must be files beside the index, these are not: {_some(outside)}")
    if odd := sorted(f for f in files if not f.endswith((".safetensors", ".bin", ".pt", ".pth"))):
        raise CheckpointError(f"{index}: names files that are not weights: {_some(odd)}")
    if absent := sorted(f for f in files if not (index.parent / f).is_file()):
        raise CheckpointError(f"{index}: names {len(absent)} files that are not there: {_some(absent)}")
    return table


def _some(items: Iterable[str]) -> str:
    items = list(items)
    return ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
