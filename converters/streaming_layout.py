"""What a group of a streaming folder consists of: which arrays, in which order, at which places."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdsi.models.weight_map import Shape
from jdsi.pallas_kernels.quantized_linear import WeightFormat

from .direct_io import round_up
from .quantization import StoredArray, StoredMatrix, quantized, stored_arrays
from .sources import ParameterSource, Watch

ALIGNMENT = 128
"""Bytes of whose multiples arrays start at, inside a group."""


class Slot(NamedTuple):
    """A place inside a group, and the array that goes there: of a quantised parameter `part`, else all of it."""

    parameter: str
    part: str
    array: StoredArray


def layout(
    names: Sequence[str], source: ParameterSource, dtype: np.dtype | None, formats: Mapping[str, WeightFormat]
) -> list[Slot]:
    """What a group consists of, in the order of offsets."""
    arrays: list[tuple[str, str, np.dtype, Shape]] = []
    for name in names:
        if name in formats:
            stored = stored_arrays(formats[name], source.shapes[name])
            arrays += [(name, part, kind, shape) for part, (kind, shape) in stored.items()]
        else:
            arrays.append((name, "", dtype or source.dtypes[name], source.shapes[name]))
    # Quantised numbers in front: what waits in memory while they are written is only the scales.
    numbers = {kind for _, part, kind, _ in arrays if part == "values"}
    arrays.sort(key=lambda array: (array[2] not in numbers, array[2].name))
    slots, end = [], 0
    for name, part, kind, shape in arrays:
        array = StoredArray(kind, shape, round_up(end, ALIGNMENT))
        slots.append(Slot(name, part, array))
        end = array.offset + array.nbytes
    return slots


def streaming_bytes(source: ParameterSource, dtype: np.dtype | None, formats: Mapping[str, WeightFormat]) -> int:
    """Bytes of all arrays that a streaming folder of these parameters holds."""
    return sum(slot.array.nbytes for slot in layout(list(source.shapes), source, dtype, formats))


def filled(
    slots: Sequence[Slot], source: ParameterSource, formats: Mapping[str, WeightFormat], watch: Watch
) -> Iterator[tuple[Slot, np.ndarray]]:
    """The slots in turn, each with its array; every parameter is read once, and not before it is needed."""
    waiting: dict[tuple[str, str], np.ndarray] = {}
    for slot in slots:
        name, part, wanted = slot
        if name not in formats:
            yield slot, source.read(name, wanted.dtype, watch)
            continue
        if (name, part) not in waiting:
            made = quantized(source.read(name, source.dtypes[name], watch), formats[name], f"parameter {name!r}")
            waiting |= {(name, made_part): array for made_part, array in made.items()}
            del made
        yield slot, waiting.pop((name, part))


def entry_of(
    name: str,
    slots: Sequence[Slot],
    source: ParameterSource,
    dtype: np.dtype | None,
    formats: Mapping[str, WeightFormat],
) -> dict[str, Any]:
    """A parameter's entry in the manifest."""
    arrays = {slot.part: slot.array for slot in slots if slot.parameter == name}
    entry = {"dtype": (dtype or source.dtypes[name]).name, "shape": list(source.shapes[name])}
    if name in formats:
        return {**entry, "quantization": StoredMatrix(formats[name], arrays).as_json()}
    return {**entry, "offset": arrays[""].offset}
