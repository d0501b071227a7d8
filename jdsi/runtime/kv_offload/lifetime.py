"""The tasks that give a batch its slabs, rearrange its rows, and free what it holds.

They are the loading thread's, which runs one behind another and is never interrupted: nothing is freed while another of
them is busy with it, and what one got is noted when it ends.
"""

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from .layout import Layout
from .moves import LayerState
from .slabs import Slab, SlabHome
from .store import Worker


def begin(home: SlabHome, layout: Layout, rows: int, layers: list[LayerState]) -> None:
    """Makes room for a batch, and puts its layers, all rows empty, into `layers`.

    Raises:
        CapacityError: there is none; `layers` is as it was.
        ConfigError: the rows cannot be divided over the axis "data".
    """
    ranges = layout.row_ranges(rows)
    slabs = _reserve(home, layout, range(len(layout.heads)), rows)
    layers.extend(LayerState(np.zeros(rows, np.int64), ranges, own) for own in slabs)


def select(
    home: SlabHome,
    layout: Layout,
    layers: list[LayerState],
    ahead: set[Future],
    rows: Int[np.ndarray, " N"],
    sources: Mapping[Any, Int[np.ndarray, " n"]],
) -> None:
    """Row i of every layer becomes a copy of row `rows[i]`.

    Args:
        ahead: see `SlabStore`; what was loaded of the rows as they were is forgotten.
        sources: see `Layout.sources`.

    Raises:
        CapacityError: there is no room for more rows; of some layers they may be selected, as after any other error.
    """
    for state in layers:
        if state.saving is not None:
            state.saving.result()
        if state.loading is not None:  # and done, as all that this thread was given before
            ahead.discard(state.loading)
            state.loading = None
        if state.out is not None:
            state.out.release(home)
    ranges = layout.row_ranges(len(rows))
    for layer, state in enumerate(layers):
        slabs, others = state.slabs, state.slabs
        if len(rows) != len(state.lengths):  # one layer at a time, so that no more than one is there twice
            (others,) = _reserve(home, layout, [layer], len(rows))
        try:
            _copy_rows(home, state, others, sources)
        except BaseException:
            if others is not slabs:
                _free(home, others)
            raise
        state.slabs, state.rows, state.lengths = others, ranges, state.lengths[rows]
        if others is not slabs:
            _free(home, slabs)
        for device, pair in state.kept.items():
            keys, values = (jnp.take(x, sources[device], axis=0) for x in pair)
            state.kept[device] = keys, values


def end(home: SlabHome, layers: list[LayerState], ahead: set[Future], saves: Worker) -> None:
    """Gives back what a batch holds; the second time does nothing.

    It relies on what the two threads have done only, for the caller may have been interrupted before it noted anything.
    """
    saves.submit(lambda: None).result()
    for layer in layers:
        if layer.loading is not None:
            ahead.discard(layer.loading)
        if layer.out is not None:
            layer.out.release(home)
        _free(home, layer.slabs)
    layers.clear()


def _reserve(home: SlabHome, layout: Layout, layers: Sequence[int], rows: int) -> list[dict[Any, tuple[Slab, Slab]]]:
    """Slabs for keys and values of layers, each for the devices that offload it, or none at all."""
    shapes = [
        (slots, own_rows, kv_heads, dim)
        for layer in layers
        for _ in layout.offloading(layer)
        for own_rows, kv_heads, slots, dim in layout.share_shapes(layer, rows)
    ]
    slabs = iter(home.allocate(shapes, layout.dtype))
    return [{device: (next(slabs), next(slabs)) for device in layout.offloading(layer)} for layer in layers]


def _copy_rows(
    home: SlabHome,
    layer: LayerState,
    targets: Mapping[Any, tuple[Slab, Slab]],
    sources: Mapping[Any, Int[np.ndarray, " n"]],
) -> None:
    """Row i of each device's target slabs becomes a copy of row `sources[device][i]`; they may be the layer's slabs."""
    for device, slabs in layer.slabs.items():
        chosen, own = sources[device], layer.lengths[layer.rows[device]]
        with contextlib.ExitStack() as stack:
            memories = others = home.load(slabs, layer.used)
            stack.callback(home.release, memories)
            if targets[device] is not slabs:
                others = home.load(targets[device], 0)
                stack.callback(home.release, others)
            for memory, other in zip(memories, others, strict=True):
                other[: layer.used] = memory[: layer.used][:, chosen]
            home.save(targets[device], others, np.zeros_like(chosen), own[chosen])


def _free(home: SlabHome, slabs: Mapping[Any, tuple[Slab, Slab]]) -> None:
    for pair in slabs.values():
        home.free(pair)
