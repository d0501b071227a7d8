"""What both ways to lay out a block of decode attention have in common: copies, masks, values behind the last key."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..attention.form import AttentionForm
from ..attention.tile import Softmax, tile_scores
from .plan import ROWS, Plan
from .tiles import Memory

BY_COLUMN, BY_ROW = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA.reduce(1)


class Span(NamedTuple):
    """What a block computes.

    Attributes:
        begin, stop: the part's tiles.
        first_column: the block's first query.
        q_start, k_length: of the row.
    """

    begin: jax.Array
    stop: jax.Array
    first_column: jax.Array
    q_start: jax.Array
    k_length: jax.Array


@dataclasses.dataclass
class Block(abc.ABC):
    """The loop over the tiles of one part.

    Attributes:
        plan: of the call.
        source: the keys and values.
        memory: shared memory and barriers, by name.
        group: index of this warpgroup; `None` if there is one only.
        span: which part, of which queries.
        slopes: ALiBi's, of each query.
    """

    plan: Plan
    source: Memory
    memory: dict[str, Any]
    group: jax.Array | None
    span: Span
    slopes: jax.Array | None = None

    @abc.abstractmethod
    def load_slopes(self, slopes: Any) -> None:
        """Reads ALiBi's slopes of the block's queries."""

    @abc.abstractmethod
    def attend(self) -> tuple[jax.Array, Softmax]:
        """The weighted sums of the values, and the softmax's state."""

    @abc.abstractmethod
    def write(self, sums: jax.Array, state: Softmax, out: Any, lse: Any) -> None:
        """Writes the result to `out[column, value dim]` and its logarithm to `lse[column]`."""

    @property
    def values(self) -> Any:
        """The value dims that this warpgroup sums."""
        mine = self.plan.value_rows // self.plan.warpgroups
        return pl.ds(0 if self.group is None else self.group * mine, mine)

    def slot(self, number: jax.Array) -> jax.Array:
        """Where in shared memory a tile goes."""
        return lax.rem(number - self.span.begin, self.plan.tiling.stages)

    def copy(self, number: jax.Array, *which: str, places: Any = None) -> None:
        """Starts a tile's copies; those of tiles behind the part's last are left out."""

        @pl.when(number < self.span.stop)
        def _() -> None:
            found = self.source.find(number) if places is None else places
            for name in which:
                self.source.copy(found, name, self.memory, self.slot(number))

    @property
    def _all(self) -> tuple[str, ...]:
        return ("k",) if self.plan.shared else ("k", "v")

    def fill(self) -> None:
        """Starts the copies of the first tiles."""

        @on_leader(self.group)
        def _() -> None:
            for stage in range(self.plan.tiling.stages):
                self.copy(self.span.begin + stage, *self._all)

    def meet(self) -> None:
        """Waits for the other warpgroup."""
        if self.group is not None:
            plgpu.barrier_arrive(self.memory["meeting"])
            plgpu.barrier_wait(self.memory["meeting"])

    def scores(self, raw: jax.Array, number: jax.Array, key: jax.Array, column: jax.Array) -> tuple[jax.Array, float]:
        """Masked scores of a tile and their factor: see `tile_scores`.

        Args:
            raw: products of keys and queries.
            number: of the tile.
            key, column: of each product, its key's place in the tile and its query's in the block.
        """
        plan, span = self.plan, self.span
        position = key + self.source.tiles.position(number) * plan.tiling.keys
        token = lax.div(column + span.first_column, plan.group) if plan.length > 1 else 0
        distance = position - (span.q_start + token)
        visible = position < span.k_length
        if plan.page:
            visible &= self.source.is_there(number, key)
        form, visible = _with_sinks(plan, position, distance, visible)
        return tile_scores(raw, form, distance, slope=self.slopes, visible=visible)

    def clean(self, values: Any, number: jax.Array) -> None:
        """Makes zeros of a tile's values behind the last key, where anything may stand.

        Their weights are zero, but a NaN would outlive that.
        """
        rest = self.span.k_length - self.source.tiles.position(number) * self.plan.tiling.keys

        # Where values are part of the keys, the product with the queries may read these rows before and after: it finds
        # the same numbers in those that count, and what it makes of the others is masked.
        @pl.when(rest < self.plan.tiling.keys)
        def _() -> None:
            @pl.loop(0, values.shape[1] // ROWS)
            def _(i: jax.Array) -> None:
                part = values.at[:, pl.ds(i * ROWS, ROWS)]
                part[...] = first_rows(part[...], rest)

            plgpu.commit_smem()  # before the product with the weights


def on_leader(group: jax.Array | None) -> Callable[[Callable[[], None]], Any]:
    """What one warpgroup does for all."""
    return (lambda f: f()) if group is None else pl.when(group == 0)


def first_rows(x: jax.Array, count: jax.Array) -> jax.Array:
    """`x` with zeros from row `count` on."""
    row = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=plgpu.Layout.WGMMA)
    return jnp.where(row < count, x, jnp.zeros((), x.dtype))


def _with_sinks(plan: Plan, key: jax.Array, distance: jax.Array, visible: jax.Array) -> tuple[AttentionForm, jax.Array]:
    """What is left of the form to mask, and the mask with the sinks that the form's window would hide."""
    form = plan.form
    if form.window is None or not plan.sinks:
        return form, visible
    near = distance > -form.window
    if not form.causal:
        near &= distance < form.window
    return dataclasses.replace(form, window=None), visible & (near | (key < plan.sinks))
