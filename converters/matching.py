"""Fitting a checkpoint's tensors to a family's table, with one complete report of what does not fit."""

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping

from jdsi.errors import CheckpointError, JdsiWarning
from jdsi.models.weight_map import Shape, WeightMap

from .safetensors_file import TensorInfo

_SHOWN = 20
_CANDIDATES = 500


def by_table_name(tensors: Mapping[str, TensorInfo], weight_map: WeightMap) -> dict[str, TensorInfo]:
    """A checkpoint's tensors under the names that a table has for them; those it does not know keep theirs.

    Older names are replaced, and where the bare backbone was saved its prefix is added.
    """
    prefix = weight_map.prefix
    current = {weight_map.current_name(name): info for name, info in tensors.items()}
    # A tensor that has its name already comes before one that is renamed to it.
    current |= {name: info for name, info in tensors.items() if name in current}
    if not prefix or any(name.startswith(prefix) for name in current):
        return current
    known = {source.name for entry in weight_map.entries for source in entry.sources}
    known.update(name for pair in weight_map.tied for name in pair)
    ignored = [re.compile(pattern) for pattern in weight_map.ignored]

    def in_table(name: str) -> str:
        full = prefix + name
        return full if full in known or any(p.fullmatch(full) for p in ignored) else name

    return {in_table(name): info for name, info in current.items()}


def match(
    tensors: Mapping[str, TensorInfo],
    weight_map: WeightMap,
    shapes: Mapping[str, Shape],
    *,
    where: str,
    strict: bool = False,
) -> dict[str, TensorInfo]:
    """Find every tensor that a table asks for.

    Args:
        tensors: what the checkpoint holds, by the table's names, see `by_table_name`.
        weight_map: the family's table.
        shapes: the shape of each of our parameters, by dotted path.
        where: names the checkpoint in messages.
        strict: whether tensors that the table does not know are an error.

    Returns:
        The stored tensor for each name that the table uses.

    Raises:
        CheckpointError: tensors are missing or have another shape, or `strict` and some are not in the table; one error
            reports them all.

    Warns:
        JdsiWarning: tensors are not in the table, and not read.
    """
    ours = {entry.ours for entry in weight_map.entries}
    if odd := sorted(ours ^ shapes.keys()):
        raise CheckpointError(
            f"the family's table and its parameters disagree about {some(odd)}; this is a fault of the family"
        )
    found: dict[str, TensorInfo] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    for entry in weight_map.entries:
        for source, shape in zip(entry.sources, entry.source_shapes(shapes[entry.ours]), strict=True):
            info = tensors.get(source.name)
            if info is None:
                missing.append(source.name)
                continue
            found[source.name] = info
            if info.shape != tuple(shape):
                misshapen.append(f"{info.name} in {info.file.name}: {info.shape}, wanted {tuple(shape)}")
    patterns = [re.compile(pattern) for pattern in weight_map.ignored]
    unused = [
        info for name, info in tensors.items() if name not in found and not any(p.fullmatch(name) for p in patterns)
    ]
    if not (missing or misshapen or (strict and unused)):
        if unused:
            warnings.warn(f"{where}: not used by this model: {some(info.name for info in unused)}", JdsiWarning, 2)
        return found
    stray = [f"{info.name} in {info.file.name}" for info in unused]
    lost = [
        name + _like(name, [info.name for info in unused]) if i < _SHOWN else name for i, name in enumerate(missing)
    ]
    parts = [
        _section("missing", lost),
        _section("of another shape", misshapen),
        _section("not known to this family", stray),
    ]
    raise CheckpointError(f"{where} does not fit the model its config describes:" + "".join(parts))


def some(items: Iterable[str]) -> str:
    """The first few of `items` in a message, and how many more there are."""
    items = list(items)
    return ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


def _like(name: str, candidates: list[str]) -> str:
    close = difflib.get_close_matches(name, candidates[:_CANDIDATES], n=1, cutoff=0.75)
    return f" (there is {close[0]!r})" if close else ""


def _section(title: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f"\n    ... and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"\n  {len(items)} {title}:" + "".join(f"\n    {item}" for item in items[:_SHOWN]) + more
