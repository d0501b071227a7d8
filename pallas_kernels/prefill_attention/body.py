"""What one block of the prefill kernel does: 128 queries of one head, against every key that one of them sees.

Its two warpgroups of 64 queries take turns: while one has the tensor cores for its matrix products, the other does its
exponentials. A turn is for the products of one step's weights and values and of the next step's queries and keys, or,
where registers are too few for that, for one of the two.

Keys and values arrive in shared memory a few steps ahead, fetched by the first warpgroup; the turns also tell it when a
place is free. There is no warpgroup that only fetches: a block of two can have 255 registers a thread, whereas three
rely on `setmaxnreg`, which is ignored where XLA assembles kernels with nvJitLink.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from ..attention.form import AttentionForm
from ..attention.tile import Softmax, finish, start, tile_scores, update
from ..mosaic import ACC, block_indices
from .spans import Span, geometric_span

WARPGROUPS = 2
ROWS = 64  # queries of a warpgroup, the height of its matrix products
QUERY_BLOCK = WARPGROUPS * ROWS
_BY_COLUMN, _BY_ROW = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA.reduce(1)


class Inputs(NamedTuple):
    """What the kernel reads, in device memory: `None` where the call has no such argument."""

    q: Any
    k: Any
    v: Any
    q_start: Any
    k_lengths: Any
    q_segments: Any
    k_segments: Any
    spans: Any
    slopes: Any


class Memory(NamedTuple):
    """Shared memory and barriers of one block.

    Attributes:
        q_out: queries and later results, in one place per warpgroup.
        k, v: `stages` blocks each.
        lse, q_segments: per warpgroup.
        k_segments: as `k`.
        q_ready, k_ready, v_ready: tell that a copy has arrived; as `q`, `k`, `v`.
        turn: where the warpgroups meet.
    """

    q_out: Any
    k: Any
    v: Any
    lse: Any
    q_segments: Any
    k_segments: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    turn: Any


def attend(inputs: Inputs, out: Any, lse: Any, memory: Memory, form: AttentionForm, queries: int) -> None:
    """Writes the result of one block of queries and, unless `lse` is `None`, their logarithms."""
    block = _Block(inputs, memory, form, queries)
    block.fetch_first()
    values, softmax = block.all_steps()
    block.store(out, lse, values, softmax)


class _Block:
    """One block, as one of its warpgroups sees it."""

    def __init__(self, inputs: Inputs, memory: Memory, form: AttentionForm, queries: int) -> None:
        self.inputs, self.memory, self.form = inputs, memory, form
        self.stages, self.size = memory.k.shape[:2]
        self.keys = inputs.k.shape[2]
        blocks, (batch, _, heads, _) = pl.cdiv(queries, QUERY_BLOCK), inputs.q.shape
        block, self.row, self.head = block_indices(blocks, batch, heads)
        self.warpgroup = lax.axis_index("warpgroup")
        self.kv_head = lax.div(self.head, jnp.int32(inputs.q.shape[2] // inputs.k.shape[1]))
        self.q, self.out = (place.at[self.warpgroup] for place in memory.q_out)
        # Blocks with the most keys go first, so that short ones fill the end.
        number = blocks - 1 - block
        begin = number * QUERY_BLOCK
        self.at = pl.ds(begin + self.warpgroup * ROWS, ROWS)

        offset = jnp.int32(0) if inputs.q_start is None else inputs.q_start[self.row]
        self.first_query = offset + begin + self.warpgroup * ROWS
        self.limit = jnp.int32(self.keys)
        if inputs.k_lengths is not None:
            self.limit = lax.clamp(jnp.int32(0), inputs.k_lengths[self.row], self.limit)
        end = lax.min(begin + QUERY_BLOCK, jnp.int32(queries))
        self.span = geometric_span(form, offset + begin, offset + end, self.limit, self.size)
        if inputs.spans is not None:
            self.span = self.span.within(Span(*(inputs.spans[self.row, number, i] for i in range(4))))
        self.steps = self.span.last - self.span.first
        self.slope = None if inputs.slopes is None else inputs.slopes[self.head]
        self.q_segments = None
        # Both products in one turn keep the tensor cores busier, but weights then wait in registers. Beside a bias, or
        # wide values and segments, none are left for them: the compiler would spill.
        self.together = form.alibi is None and (inputs.q_segments is None or inputs.v.shape[-1] <= 128)

    def fetch_first(self) -> None:
        """Brings the queries, and as many keys and values as there is space for."""
        for ahead in range(self.stages):

            @pl.when((self.warpgroup == 0) & (ahead < self.steps))
            def _(step: int = ahead) -> None:
                self._fetch_keys(jnp.int32(step))
                self._fetch_values(jnp.int32(step))

        ready = self.memory.q_ready.at[self.warpgroup]
        plgpu.copy_gmem_to_smem(self.inputs.q.at[self.row, self.at, self.head], self.q, ready)
        if self.inputs.q_segments is None:
            plgpu.barrier_wait(ready)
        else:
            q_segments = self.memory.q_segments.at[self.warpgroup]
            plgpu.copy_gmem_to_smem(self.inputs.q_segments.at[self.row, self.at], q_segments, ready)
            plgpu.barrier_wait(ready)
            self.q_segments = plgpu.load(q_segments, layout=_BY_ROW)

    def _fetch_keys(self, step: Array) -> None:
        slot, at = self._slot(step), pl.ds(self._first_key(step), self.size)
        ready = self.memory.k_ready.at[slot]
        plgpu.copy_gmem_to_smem(self.inputs.k.at[self.row, self.kv_head, at], self.memory.k.at[slot], ready)
        if self.inputs.k_segments is not None:
            plgpu.copy_gmem_to_smem(self.inputs.k_segments.at[self.row, at], self.memory.k_segments.at[slot], ready)

    def _fetch_values(self, step: Array) -> None:
        slot, at = self._slot(step), pl.ds(self._first_key(step), self.size)
        ready = self.memory.v_ready.at[slot]
        plgpu.copy_gmem_to_smem(self.inputs.v.at[self.row, self.kv_head, at], self.memory.v.at[slot], ready)

    def _in_place_of(self, step: Array, fetch: Callable[[Array], None]) -> None:
        """Fetches what comes to the place of `step`, with which both warpgroups must be done."""
        there = (self.warpgroup == 0) & (step >= 0) & (step + self.stages < self.steps)
        pl.when(there)(lambda: fetch(step + self.stages))

    def _slot(self, step: Array) -> Array:
        return lax.rem(step, jnp.int32(self.stages))

    def _first_key(self, step: Array) -> Array:
        return (self.span.first + step) * self.size

    def all_steps(self) -> tuple[Float[Array, "64 Dv"], Softmax]:
        """The weighted values and the softmax's state after the last key."""
        softmax = Softmax(*(plgpu.layout_cast(x, _BY_ROW) for x in start(ROWS)))
        values = jnp.zeros((ROWS, self.inputs.v.shape[-1]), jnp.float32)
        values = plgpu.layout_cast(values, plgpu.Layout.WGMMA)
        # The second warpgroup is half a step behind: so it waits once more before, the first once more after.
        pl.when(self.warpgroup == 1)(self._pass_turn)
        if self.together:
            values, softmax = lax.cond(self.steps > 0, self._steps_together, lambda *carry: carry, values, softmax)
        else:
            values, softmax = lax.fori_loop(0, self.steps, self._step, (values, softmax))
        pl.when(self.warpgroup == 0)(self._pass_turn)
        return values, softmax

    def _pass_turn(self) -> None:
        plgpu.barrier_arrive(self.memory.turn)
        plgpu.barrier_wait(self.memory.turn)

    def _step(self, step: Array, carry: tuple[Array, Softmax]) -> tuple[Array, Softmax]:
        """A turn at the tensor cores for the scores and, after the softmax, one for the values."""
        values, softmax = carry
        rescale, weights, softmax = self._softmax(step, self._scores(step), softmax)
        values = self._rescaled(values, rescale)
        values, weights, softmax = self._next_turn(step, (values, weights, softmax))
        # The other warpgroup has begun this step, so it is done with the values of the step before.
        self._in_place_of(step - 1, self._fetch_values)
        return self._weigh(step, values, weights), softmax

    def _steps_together(self, values: Array, softmax: Softmax) -> tuple[Array, Softmax]:
        """Turns at the tensor cores for the values of one step and the scores of the next."""
        _, weights, softmax = self._softmax(jnp.int32(0), self._scores(jnp.int32(0)), softmax)
        carry = values, *self._next_turn(jnp.int32(0), (weights, softmax))

        def step(step: Array, carry: tuple[Array, Array, Softmax]) -> tuple[Array, Array, Softmax]:
            values, weights, softmax = carry
            values, raw = self._weighed_and_scores(step, values, weights)
            rescale, weights, softmax = self._softmax(step, raw, softmax)
            return self._next_turn(step, (self._rescaled(values, rescale), weights, softmax))

        values, weights, softmax = lax.fori_loop(1, self.steps, step, carry)
        return self._weigh(self.steps - 1, values, weights), softmax

    def _scores(self, step: Array) -> Array:
        """The products of queries and keys, in this warpgroup's turn, which it passes on."""
        slot = self._slot(step)
        plgpu.barrier_wait(self.memory.k_ready.at[slot])

        def products(scores: Any) -> Array:
            plgpu.wgmma(scores, self.q, self.memory.k.at[slot].T)
            self._pass_turn()
            # The other warpgroup has its weights of the step before, so it is done with the keys.
            self._in_place_of(step - 1, self._fetch_keys)
            return scores[...]

        return pl.run_scoped(products, ACC((ROWS, self.size), jnp.float32))

    def _weighed_and_scores(self, step: Array, values: Array, weights: Array) -> tuple[Array, Array]:
        """The sum with the values of the step before, and the scores of this one: both in one turn."""
        slot, before = self._slot(step), self._slot(step - 1)
        plgpu.barrier_wait(self.memory.k_ready.at[slot])

        def products(scores: Any) -> tuple[Array, Array]:
            def both(values: Any) -> None:
                plgpu.wgmma(values, weights, self.memory.v.at[before])
                plgpu.wgmma(scores, self.q, self.memory.k.at[slot].T)
                self._pass_turn()
                # The other warpgroup has its weights of the step before, so it is done with the keys, and with the
                # values of the step before that.
                self._in_place_of(step - 1, self._fetch_keys)
                self._in_place_of(step - 2, self._fetch_values)

            weighed: Any = pl.run_state(both)(ACC.init(values))
            return weighed, scores[...]

        return pl.run_scoped(products, ACC((ROWS, self.size), jnp.float32))

    def _softmax(self, step: Array, raw: Array, softmax: Softmax) -> tuple[Array, Array, Softmax]:
        """What to multiply the sums with, the weights of the step, and the state."""
        distance = None if self.form.alibi is None else self._distance(step)
        scores, factor = tile_scores(raw, self.form, distance, slope=self.slope, masked=False)
        block = self.span.first + step
        clean = (block >= self.span.clean_from) & (block < self.span.clean_to)
        scores = lax.cond(clean, lambda scores: scores, lambda scores: self._hide(scores, step), scores)
        weights, rescale, softmax = update(softmax, scores, factor)
        return rescale, weights.astype(self.inputs.v.dtype), softmax

    def _rescaled(self, values: Array, rescale: Array) -> Array:
        return values * _along_rows(rescale, values.shape)

    def _next_turn(self, step: Array, carry: Any) -> Any:
        """Waits for the next turn and for the values of `step`."""
        # Nothing of this may sink below, into this warpgroup's own turn at the tensor cores.
        carry = lax.optimization_barrier(carry)
        plgpu.barrier_arrive(self.memory.turn)
        plgpu.barrier_wait(self.memory.v_ready.at[self._slot(step)])
        plgpu.barrier_wait(self.memory.turn)
        return carry

    def _weigh(self, step: Array, values: Array, weights: Array) -> Array:
        """Adds the weighted values of a step."""

        def weigh(values: Any) -> None:
            plgpu.wgmma(values, weights, self.memory.v.at[self._slot(step)])

        weighed: Any = pl.run_state(weigh)(ACC.init(values))
        return weighed

    def _number(self, axis: int) -> Array:
        return plgpu.broadcasted_iota(jnp.int32, (ROWS, self.size), axis, layout=plgpu.Layout.WGMMA)

    def _query(self, step: Array) -> Array:
        """The index of each row's query, counted as the columns of the step's scores are."""
        return self._number(0) + (self.first_query - self._first_key(step))

    def _distance(self, step: Array) -> Float[Array, "64 keys"]:
        # Exact below 2^24. In this order there is a conversion for each row and column and not for each pair.
        return self._number(1).astype(jnp.float32) - self._query(step).astype(jnp.float32)

    def _hide(self, scores: Array, step: Array) -> Array:
        """Masks a tile that lies partly outside. All bounds but segments come down to two numbers for each row."""
        form, query = self.form, self._query(step)
        ends, visible = [], None
        if form.causal:
            ends.append(query + 1)
        elif form.window is not None:
            ends.append(query + form.window)
        if self.inputs.k_lengths is not None or self.keys % self.size:
            ends.append(jnp.full_like(query, self.limit - self._first_key(step)))
        if ends:
            visible = self._number(1) < functools.reduce(jnp.minimum, ends)
        if form.window is not None:
            visible = _both(visible, self._number(1) > query - form.window)
        if self.q_segments is not None:
            k_segments = plgpu.load(self.memory.k_segments.at[self._slot(step)], layout=_BY_COLUMN)
            plgpu.commit_smem()  # the copy that comes to this place next must not overtake the load
            columns = lax.broadcast_in_dim(k_segments, scores.shape, [1])
            visible = _both(visible, _along_rows(self.q_segments, scores.shape) == columns)
        return scores if visible is None else jnp.where(visible, scores, -jnp.inf)

    def store(self, out: Any, lse: Any, values: Float[Array, "64 Dv"], softmax: Softmax) -> None:
        """Writes the result.

        Its copy is one of a box of swizzled tiles, which ends at the array's last query. That of the logarithms is one
        of so many bytes, which nothing ends: their array has whole blocks of queries.
        """
        reciprocal, logarithm = finish(softmax)
        self.out[...] = (values * _along_rows(reciprocal, values.shape)).astype(self.out.dtype)
        if lse is not None:
            self.memory.lse[self.warpgroup] = logarithm
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.out, out.at[self.row, self.at, self.head])
        if lse is not None:
            plgpu.copy_smem_to_gmem(self.memory.lse.at[self.warpgroup], lse.at[self.row, self.head, self.at])
        plgpu.wait_smem_to_gmem(0)


def _along_rows(numbers: Array, shape: tuple[int, ...]) -> Array:
    return lax.broadcast_in_dim(numbers, shape, [0])


def _both(mask: Array | None, other: Array) -> Array:
    return other if mask is None else mask & other
