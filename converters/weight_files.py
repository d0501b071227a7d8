"""Which files of a Hugging Face folder hold its weights."""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jdsi.errors import CheckpointError, JdsiWarning

from .config import read_json
from .manifest import MANIFEST
from .matching import some
from .mistaken import explain_folder

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state|adapter_model).*")
_STANDARD = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """The files to read.

    Attributes:
        files: in order.
        index: the file of each tensor that an index names; empty without one.
    """

    files: tuple[Path, ...]
    index: Mapping[str, str] = MappingProxyType({})

    @classmethod
    def of(cls, folder: Path, named: Any = None) -> "WeightFiles":
        """The files that `transformers` would read: whole before sharded, safetensors before PyTorch's.

        One file is preferred to an index beside it, which an older model may have left, unless that index counts it
        among its shards. Weights under other names are taken where there are none under the usual ones.

        Args:
            folder: of the checkpoint.
            named: the file or index that the config names, see `transformers_weights` there.

        Raises:
            CheckpointError: there are none, or an index is damaged or does not agree with the files.

        Warns:
            JdsiWarning: weights under the usual names are left that belong to another set, or an adapter is.
        """
        chosen = cls._usual(folder) or cls._loose(folder) if named is None else cls._named(folder, named)
        if (folder / "adapter_config.json").is_file() or any(folder.glob("adapter_model.*")):
            warnings.warn(
                f"{folder}: holds an adapter (PEFT) beside the model, which is read without it; peft's "
                "merge_and_unload() makes one model of both",
                JdsiWarning,
                stacklevel=2,
            )
        taken = {file.name for file in chosen.files}
        if left := sorted(f.name for f in folder.iterdir() if _STANDARD.fullmatch(f.name) and f.name not in taken):
            warnings.warn(
                f"{folder}: holds two sets of weights; {some(sorted(taken))} is read, and not {some(left)}",
                JdsiWarning,
                stacklevel=2,
            )
        return chosen

    @classmethod
    def _named(cls, folder: Path, name: Any) -> "WeightFiles":
        if not isinstance(name, str) or name != Path(name).name or not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: config.json names {name!r} as transformers_weights, which is no file beside it"
            )
        return cls._indexed(folder / name) if name.endswith(".json") else cls((folder / name,))

    @classmethod
    def _usual(cls, folder: Path) -> "WeightFiles | None":
        for name in ("model.safetensors", "pytorch_model.bin"):
            single, index = folder / name, folder / f"{name}.index.json"
            if index.is_file() and not (single.is_file() and name not in files_named(index)):
                return cls._indexed(index)
            if single.is_file():
                return cls((single,))
        return None

    @classmethod
    def _indexed(cls, index: Path) -> "WeightFiles":
        table = _read_index(index)
        return cls(tuple(index.parent / name for name in sorted(set(table.values()))), table)

    @classmethod
    def _loose(cls, folder: Path) -> "WeightFiles":
        """Under another name, or shards that lost their index."""
        for suffixes in (_SUFFIXES[:1], _SUFFIXES[1:]):
            found = [f for f in sorted(folder.iterdir()) if f.suffix in suffixes and not _NOT_WEIGHTS.fullmatch(f.name)]
            if found:
                return cls(tuple(found))
        raise CheckpointError(
            f"{folder}: {explain_folder(folder) or 'no weights: neither *.safetensors nor *.bin files'}"
        )


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds weights of any layout, or says that it does."""
    return (folder / MANIFEST).is_file() or any(
        (file.suffix in _SUFFIXES and not _NOT_WEIGHTS.fullmatch(file.name)) or file.name.endswith(".index.json")
        for file in folder.iterdir()
    )


def files_named(index: Path) -> set[str]:
    """The files that an index names; none if it is damaged, for it may be of no interest."""
    try:
        return set(_table_of(index).values())
    except CheckpointError:
        return set()


def _table_of(index: Path) -> dict[str, str]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(file, str) for file in table.values()):
        raise CheckpointError(f"{index}: 'weight_map' must be an object from tensor names to file names")
    return table


def _read_index(index: Path) -> dict[str, str]:
    table = _table_of(index)
    files = set(table.values())
    # A bare file name only: an index must not make us read outside its own folder.
    if outside := sorted(f for f in files if f != Path(f).name or "\\" in f or "\0" in f or f in ("", ".", "..")):
        raise CheckpointError(f"{index}: shards must be files beside the index, these are not: {some(outside)}")
    if odd := sorted(f for f in files if not f.endswith(_SUFFIXES)):
        raise CheckpointError(f"{index}: names files that are not weights: {some(odd)}")
    if absent := sorted(f for f in files if not (index.parent / f).is_file()):
        raise CheckpointError(f"{index}: names {len(absent)} files that are not there: {some(absent)}")
    return table
