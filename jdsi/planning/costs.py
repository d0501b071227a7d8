"""The work of a forward pass, counted from a model's spec alone: operations, bytes, and what devices exchange.

What is counted is what the engine's kernels do: norms in front of products, biases, activations and residuals are part
of them; causal attention skips what a query does not see; every array is read once and written once. Sizes are those
of a rank's share with its padding, and the exchanges those that the layers call inside `jax.shard_map`.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from jdsi.models import TransformerSpec
from jdsi.models.spec import LayerSpec
from jdsi.models.tensor_parallel import SEQUENCE_PARALLEL_TOKENS
from jdsi.models.work import Operation, Work, Workload
from jdsi.sharding import DATA, PIPE, TENSOR, Parallelism

from .collectives import Collective
from .shares import even_stages, share_of

_HLO_NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


@dataclasses.dataclass(frozen=True)
class StageCosts:
    """What one device of a pipeline stage does for one micro-batch.

    Attributes:
        layers: of the stage.
        operations: in order, those of equal layers together.
        collectives: within the stage.
        transfer: what goes to the next stage; from the last one, tokens to the first. `None` with one stage.
    """

    layers: range
    operations: tuple[Operation, ...]
    collectives: tuple[Collective, ...]
    transfer: Collective | None

    def total(self, attribute: str) -> int:
        """The sum of an attribute of the operations, such as "flops", "bytes" or "kernels"."""
        return sum(getattr(operation, attribute) * operation.count for operation in self.operations)


def stage_costs(
    spec: TransformerSpec,
    parallelism: Parallelism,
    work: Workload,
    *,
    dtype: DTypeLike = "bfloat16",
    stages: Sequence[range] | None = None,
    sequence_parallel: bool | None = None,
) -> tuple[StageCosts, ...]:
    """What each stage of the pipeline does for one micro-batch.

    Args:
        spec: the model's.
        parallelism: degrees.
        work: the micro-batch of one data-parallel group.
        dtype: of weights, activations and KV cache.
        stages: layers of each, by default `even_stages`.
        sequence_parallel: whether the tokens of the residual stream are divided over "tensor" between products; by
            default as the executor does it, where they are many.

    Raises:
        ConfigError: there are more stages than layers.
    """
    dtype = jnp.dtype(dtype)
    counting = _Counting(share_of(spec, parallelism.tensor).spec, parallelism, work, dtype, sequence_parallel)
    return tuple(counting.stage(layers) for layers in stages or even_stages(spec, parallelism.pipeline))


class _Counting:
    def __init__(
        self,
        share: TransformerSpec,
        parallelism: Parallelism,
        work: Workload,
        dtype: jnp.dtype,
        sequence_parallel: bool | None,
    ) -> None:
        self._share, self._parallelism, self._work, self._item = share, parallelism, work, dtype.itemsize
        self._units = Work(work, dtype.itemsize)
        self._dtype = _HLO_NAMES.get(dtype.name, dtype.name)
        self._ranks, self._width, self._tokens = parallelism.tensor, share.width, work.tokens
        self._table = share.embedding.width or share.width
        wanted = work.tokens >= SEQUENCE_PARALLEL_TOKENS if sequence_parallel is None else sequence_parallel
        self._divided = wanted and self._ranks > 1 and self._tokens % self._ranks == 0
        self._own_tokens = self._tokens // self._ranks if self._divided else self._tokens

    def stage(self, layers: range) -> StageCosts:
        first, last = layers.start == 0, layers.stop == len(self._share.layers)
        operations: list[Operation] = []
        collectives: list[Collective] = []
        if first:
            operations += self._embedding()
            collectives += self._embedding_exchange()
        specs = [self._share.layers[i] for i in layers]
        for layer in dict.fromkeys(specs):
            count = specs.count(layer)
            operations += (dataclasses.replace(one, count=count) for one in self._layer(layer))
            collectives += (dataclasses.replace(c, count=count * c.count) for c in self._layer_exchange(layer))
        if last:
            operations += self._head()
            collectives += self._head_exchange()
        return StageCosts(layers, tuple(operations), tuple(_together(collectives)), self._transfer(last))

    def _layer(self, layer: LayerSpec) -> Iterator[Operation]:
        sublayers, stream = len(layer.sublayers), self._own_tokens * self._width
        # Only a single rank's product can add the residual itself: others add it to the sum over ranks.
        units = dataclasses.replace(self._units, residual=stream if self._ranks == 1 else 0)
        for one in layer.sublayers:
            yield from one.work(self._width, units)
        if self._ranks > 1:
            sums = layer.residual.exchanges(sublayers)
            yield units.elementwise("residual", 3 * stream * sums, sums)
        if norms := layer.residual.separate_norms(sublayers, divided=self._divided):
            yield units.elementwise("norm", 2 * stream * norms, norms)

    def _embedding(self) -> Iterator[Operation]:
        spec, width, table = self._share.embedding, self._width, self._table
        tables = 1 + (spec.positions is not None) + (spec.token_types > 0)
        yield self._units.elementwise("embedding", self._tokens * (tables * table + width))
        if table != width:
            yield self._units.product("project", width, table, bias=False, tokens=self._tokens)

    def _head(self) -> Iterator[Operation]:
        spec, rows, width, table = self._share, self._work.rows, self._width, self._table
        if spec.norm is not None:
            yield self._units.elementwise("norm", 2 * self._tokens * width)
        if spec.head is None:
            return
        if spec.head.transform is not None:
            yield self._units.product("dense", width, width, bias=True, tokens=rows)
        if table != width:
            yield self._units.product("project", table, width, bias=False, tokens=rows)
        vocabulary = spec.vocab_size
        yield Operation(
            "head",
            flops=2 * rows * vocabulary * table,
            weight_bytes=vocabulary * table * self._item,
            activation_bytes=rows * (table * self._item + vocabulary * 4),
        )
        # The largest, the first that equals it, and its probability: three passes over float32.
        yield Operation("sample", activation_bytes=3 * 4 * rows * vocabulary, kernels=3)

    def _embedding_exchange(self) -> Iterator[Collective]:
        if self._ranks > 1:
            yield self._exchange("all-reduce", (self._tokens, self._table))

    def _layer_exchange(self, layer: LayerSpec) -> Iterator[Collective]:
        if self._ranks == 1:
            return
        hidden, count = (self._tokens, self._width), layer.residual.exchanges(len(layer.sublayers))
        for kind in ("all-gather", "reduce-scatter") if self._divided else ("all-reduce",):
            yield self._exchange(kind, hidden, count=count)

    def _head_exchange(self) -> Iterator[Collective]:
        rows = (self._work.rows,)
        if self._divided:  # each row's last token, from the rank that has it
            yield self._exchange("all-reduce", (self._work.rows, self._width))
        if self._ranks > 1 and self._share.head is not None:
            yield self._exchange("all-reduce", rows, "s32", count=2)
        if self._parallelism.data > 1:  # every device gets all tokens, their log-probabilities, and which were the last
            batch = self._work.rows * self._parallelism.data
            yield Collective("all-gather", "s32", (batch,), (4 + 4 + 1) * batch, self._parallelism.data, DATA, arrays=3)

    def _transfer(self, last: bool) -> Collective | None:
        if self._parallelism.pipeline == 1:
            return None
        if last:
            rows = self._work.rows
            return Collective("collective-permute", "s32", (rows,), 4 * rows, 2, PIPE)
        shape = (self._own_tokens, self._width)
        return Collective("collective-permute", self._dtype, shape, shape[0] * shape[1] * self._item, 2, PIPE)

    def _exchange(self, kind: str, shape: tuple[int, ...], dtype: str | None = None, count: int = 1) -> Collective:
        size = 4 if dtype else self._item
        for dim in shape:
            size *= dim
        return Collective(kind, dtype or self._dtype, shape, size, self._ranks, TENSOR, count=count)


def _together(collectives: Sequence[Collective]) -> Iterator[Collective]:
    """Equal collectives as one with their count."""
    counts: dict[Collective, int] = {}
    for one in collectives:
        key = dataclasses.replace(one, count=1)
        counts[key] = counts.get(key, 0) + one.count
    return (dataclasses.replace(key, count=count) for key, count in counts.items())
