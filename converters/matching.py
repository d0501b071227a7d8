"""Fitting a checkpoint's tensors to a family's table, with one complete report of what does not fit."""

import difflib
import re
from collections.abc import Mapping

from jdsi.errors import CheckpointError
from jdsi.models.weight_map import Shape, WeightMap

from .safetensors_file import TensorInfo

_SHOWN = 20
_CANDIDATES = 500


def match(
    tensors: Mapping[str, TensorInfo], weight_map: WeightMap, shapes: Mapping[str, Shape], *, where: str
) -> dict[str, TensorInfo]:
    """Find every tensor that a table asks for.

    Args:
        tensors: what the checkpoint holds.
        weight_map: the family's table. When no stored name starts with its prefix, names are looked up without it.
        shapes: the shape of each of our parameters, by dotted path.
        where: names the checkpoint in messages.

    Returns:
        The stored tensor for each name that the table uses.

    Raises:
        CheckpointError: tensors are missing, have another shape, or are in the checkpoint and not in the table; one
            error reports them all.
    """
    ours = {entry.ours for entry in weight_map.entries}
    if odd := sorted(ours ^ shapes.keys()):
        raise CheckpointError(
            f"the family's table and its parameters disagree about {_some(odd)}; this is a fault of the family"
        )
    tensors = {weight_map.current_name(name): info for name, info in tensors.items()}
    prefix = weight_map.prefix
    bare = bool(prefix) and not any(name.startswith(prefix) for name in tensors)
    found: dict[str, TensorInfo] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    used: set[str] = set()
    for entry in weight_map.entries:
        for source, shape in zip(entry.sources, entry.source_shapes(shapes[entry.ours]), strict=True):
            name = source.name.removeprefix(prefix) if bare else source.name
            info = tensors.get(name)
            if info is None:
                missing.append(name)
                continue
            used.add(name)
            found[source.name] = info
            if info.shape != tuple(shape):
                misshapen.append(f"{name} in {info.file.name}: {info.shape}, wanted {tuple(shape)}")
    patterns = [re.compile(pattern) for pattern in weight_map.ignored]
    unmatched = [
        name
        for name in tensors
        if name not in used and not any(p.fullmatch(name) or (bare and p.fullmatch(prefix + name)) for p in patterns)
    ]
    if not (missing or misshapen or unmatched):
        return found
    stray = [f"{name} in {tensors[name].file.name}" for name in unmatched]
    lost = [name + _like(name, unmatched) if i < _SHOWN else name for i, name in enumerate(missing)]
    parts = [
        _section("missing", lost),
        _section("of another shape", misshapen),
        _section("not known to this family", stray),
    ]
    raise CheckpointError(f"{where} does not fit the model its config.json describes:" + "".join(parts))


def _like(name: str, candidates: list[str]) -> str:
    close = difflib.get_close_matches(name, candidates[:_CANDIDATES], n=1, cutoff=0.75)
    return f" (there is {close[0]!r})" if close else ""


def _section(title: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f"\n    ... and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"\n  {len(items)} {title}:" + "".join(f"\n    {item}" for item in items[:_SHOWN]) + more


def _some(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
