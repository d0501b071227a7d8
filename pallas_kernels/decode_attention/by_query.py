"""A block of decode attention with queries along the rows of its products: latents of many heads.

With 242 operations for each byte of the latents (DeepSeek's, of 128 heads) tensor cores are the limit, not memory. Two
warpgroups share a tile of 64 keys and 64 queries: each scores half the keys, so that nothing is computed twice, gives
its weights to the other, and sums half the value dims. A tensor core operation takes 64 rows, here of queries, and time
for its columns, here half the keys or half the value dims: 36 times 16 cycles for the scores and 4 times 128 for the
values, for each of the two, in all 2180. With keys along the rows it would be 3330, and more of a softmax.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..attention.tile import Softmax, finish, start
from ..mosaic import ACC, store
from .block import BY_ROW, Block, on_leader
from .plan import ROWS

_KEYS = ROWS // 2  # of a warpgroup


class ByQuery(Block):
    """Sums are queries by value dims."""

    def load_slopes(self, slopes: Any) -> None:
        self.slopes = _along_rows(plgpu.load(slopes, layout=BY_ROW, optimized=False), (ROWS, _KEYS))

    @property
    def own(self) -> jax.Array:
        """Which of the two warpgroups this is."""
        assert self.group is not None
        return self.group

    @property
    def keys(self) -> Any:
        """The keys of a tile that this warpgroup scores."""
        return pl.ds(pl.multiple_of(self.own * _KEYS, _KEYS), _KEYS)

    def attend(self) -> tuple[jax.Array, Softmax]:
        zeros = jnp.zeros((ROWS, self.plan.value_rows // 2), jnp.float32)
        sums = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        state = Softmax(*(plgpu.layout_cast(x, BY_ROW) for x in start(ROWS)))
        sums, state = lax.fori_loop(self.span.begin, self.span.stop, self.step, (sums, state))
        first, second = self.exchange(state.total)
        return sums, state._replace(total=first + second)

    def step(self, number: jax.Array, carry: tuple[jax.Array, Softmax]) -> tuple[jax.Array, Softmax]:
        """One tile."""
        plan, memory = self.plan, self.memory
        sums, state = carry
        slot = self.slot(number)
        refill = number + plan.tiling.stages - 1
        places = self.source.find(refill)  # tables are read long before the copies need them
        plgpu.barrier_wait(memory["k_ready"].at[slot])
        values = memory["k"].at[slot, :, self.values]
        self.clean(values, number)

        def product(accumulator: Any) -> jax.Array:
            keys, q = memory["k"].at[slot, self.keys], memory["q"]

            @pl.loop(0, plan.dim // plan.dims_at_once)
            def _(i: jax.Array) -> None:
                dims = pl.ds(i * plan.dims_at_once, plan.dims_at_once)
                plgpu.wgmma(accumulator, q.at[:, dims], keys.at[:, dims].T)

            return accumulator[...]

        raw = pl.run_scoped(product, ACC((ROWS, _KEYS), jnp.float32))
        column, key = (plgpu.broadcasted_iota(jnp.int32, raw.shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))
        scores, factor = self.scores(raw, number, key + self.own * _KEYS, column)
        largest = jnp.maximum(*self.exchange(jnp.max(scores, axis=1)))

        # The other warpgroup has its scores, so it is done with the values of the step before.
        @pl.when((self.own == 0) & (number > self.span.begin))
        def _() -> None:
            self.copy(refill, "k", places=places)

        top = jnp.maximum(state.top, largest * factor)
        rescale = jnp.exp2(state.top - top)
        weights = jnp.exp2(scores * factor - _along_rows(top, scores.shape))
        total = state.total * rescale + jnp.sum(weights, axis=1)
        memory["weights"][:, self.keys] = weights.astype(plan.dtype)
        sums = sums * _along_rows(rescale, sums.shape)
        self.meet()
        weights = plgpu.load(memory["weights"], layout=plgpu.Layout.WGMMA)
        weighed: Any = pl.run_state(lambda sums: plgpu.wgmma(sums, weights, values))(ACC.init(sums))
        return weighed, Softmax(top, total)

    def exchange(self, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both warpgroups' numbers, one for each query, the first's before the second's."""
        self.memory["numbers"][self.own] = numbers
        self.meet()
        first, second = (plgpu.load(self.memory["numbers"].at[i], layout=BY_ROW, optimized=False) for i in range(2))
        return first, second

    def write(self, sums: jax.Array, state: Softmax, out: Any, lse: Any) -> None:
        scale, logarithm = finish(state)
        store(out.at[:, self.values], sums * _along_rows(scale, sums.shape))

        @on_leader(self.group)
        def _() -> None:
            store(lse, logarithm)


def _along_rows(numbers: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(numbers, shape, [0])
