"""The executor for models larger than memory: one compiled layer, weights that arrive while others compute."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdsi.converters import ParameterSource
from jdsi.converters.block_store import BlockStore
from jdsi.errors import CapacityError, ConfigError
from jdsi.kv_cache import Cache, CacheSpec, Contiguous
from jdsi.models import TransformerSpec
from jdsi.models.tensor_parallel import kv_shapes
from jdsi.pallas_kernels.operator import Implementation
from jdsi.sharding import DATA, TENSOR, Parallelism, make_mesh

from .epilogue import EpilogueProgram, left_for_another, stands_apart
from .executor import Step
from .layer_programs import LayerPrograms
from .one_process import OneProcess
from .residency import Residency
from .waiting import Waiting
from .weight_sources import BlockSource
from .weight_stream import StreamReport
from .weight_supply import WeightSupply

_CONTIGUOUS = Contiguous()


class StreamedExecutor(OneProcess):
    """See `Executor`. Weights are where `residency` says; each pass reads every streamed block once.

    Args:
        store: the model.
        residency: what stays on the devices.
        dtype: of activations; by default the one that the checkpoint's layers had.
        mesh: tensor and data parallelism over devices of this process; by default JAX's default device alone.
        source: where streamed blocks come from; by default the store's files.
        batches_per_pass: how many batches should share a pass.
        kv_limit: bytes that keys and values of a batch may take of the memory they are on, over all devices if those
            are CPUs, else on each; not limited by default.
        cache: the kind of KV memory. Closed with the executor.
        park: whether the hidden states of batches that wait for their turn go to host memory.
        implementation: what operators run, see `default_implementation`.

    Attributes:
        residency: as given.
        mesh: as given.
    """

    def __init__(
        self,
        store: BlockStore,
        residency: Residency,
        *,
        dtype: Any = None,
        mesh: Mesh | None = None,
        source: BlockSource | None = None,
        batches_per_pass: int = 1,
        kv_limit: int | None = None,
        cache: CacheSpec = _CONTIGUOUS,
        park: bool = False,
        implementation: Implementation | None = None,
    ) -> None:
        store.check_dtypes()
        self.mesh = make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
        self._spec = store.spec
        self._dtype = jnp.dtype(store.dtype if dtype is None else dtype)
        self.residency, self._batches_per_pass = residency, batches_per_pass
        self._cache, self._kv_limit, self._park = cache, kv_limit, park
        programs = LayerPrograms(store.spec, self.mesh, self._dtype, implementation)
        self._weights = WeightSupply(store, residency, self.mesh, programs, source)
        self._turn, self._passes = threading.Lock(), 0
        self._rows = NamedSharding(self.mesh, PartitionSpec(DATA))
        self._epilogues = EpilogueProgram(self.mesh, divided=store.spec.head is not None)
        self._kv_shapes = kv_shapes(store.spec, self.mesh.shape[TENSOR])

    @property
    def spec(self) -> TransformerSpec:
        """The model's."""
        return self._spec

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of activations; weights are cast to it as they are used."""
        return self._dtype

    @property
    def parallelism(self) -> Parallelism:
        """See `Executor.parallelism`."""
        return Parallelism.of(self.mesh)

    @property
    def row_multiple(self) -> int:
        """See `Executor.row_multiple`."""
        return self.mesh.shape[DATA]

    @property
    def runs_ahead(self) -> bool:
        """See `Executor.runs_ahead`."""
        return False

    @property
    def batches_per_pass(self) -> int:
        """See `Executor.batches_per_pass`."""
        return self._batches_per_pass

    def new_cache(self, rows: int, tokens: int) -> Cache:
        """See `Executor.new_cache`."""
        if self._kv_limit is not None:
            whole = self._cache.bytes(self._kv_shapes, rows, tokens, self._dtype)
            here = whole if jax.default_backend() == "cpu" else -(-whole // self.mesh.size)
            if here > self._kv_limit:
                raise CapacityError(
                    f"keys and values of {rows} rows of {tokens} tokens take {here:,} bytes, and the memory limit "
                    f"leaves {self._kv_limit:,}; lower max_batch_size, generate less at once, raise memory_limit or "
                    "set kv_offload"
                )
        return self._cache.create(self._kv_shapes, rows, tokens, self._dtype, self.mesh)

    def steps(self, batches: Sequence[Step]) -> list[tuple[Any, Any, Any]]:
        """See `Executor.steps`; every layer is used for all batches in turn (zig-zag). One thread at a time."""
        with self._turn:
            hidden, contexts, frames = self._through_layers(batches)
            results = []
            with self._weights.top_weights() as blocks:
                arrays = [block.arrays for block in blocks]
                for i, batch in enumerate(batches):
                    x = hidden.take(i)
                    apart = stands_apart(batch.epilogue)
                    epilogue, carry = (left_for_another, ()) if apart else (batch.epilogue, batch.carry)
                    result, carry, done = self._weights.top(
                        arrays, x, frames[i], batch.wanted, epilogue, carry, batch.classify
                    )
                    if apart:
                        result, carry = self._epilogues(result, batch.carry, batch.epilogue)
                    results.append((result, contexts[i].commit(), carry))
                    for block in blocks:
                        block.used_by(done)
            return results

    def _through_layers(self, batches: Sequence[Step]) -> tuple[Waiting, list[Any], list[Any]]:
        self._passes += 1
        contexts = [batch.context for batch in batches]
        # Each is put in its place once for all layers, whose programs would otherwise do it, and be compiled for it.
        frames = [jax.device_put(context.only(()), self._rows) for context in contexts]
        hidden = Waiting(len(batches), self._rows, park=self._park and len(batches) > 2)
        self._announce(contexts, 0, 0)
        with self._weights.block("embedding") as block:
            for i, (batch, frame) in enumerate(zip(batches, frames, strict=True)):
                tokens = jax.device_put(batch.tokens, self._rows)
                x, done = self._weights.embed(block.arrays, tokens, frame, batch.token_types)
                hidden.put(i, x)
                block.used_by(done)
        for index in range(len(self._spec.layers)):
            with self._weights.layer(index, len(batches)) as (block, run):
                for i, frame in enumerate(frames):
                    memory = contexts[i].memory(index)
                    self._announce(contexts, index, i + 1)
                    x, memory, done = run(block.arrays, hidden.take(i), memory, frame)
                    hidden.put(i, x)
                    contexts[i] = contexts[i].with_memory(index, memory)
                    block.used_by(done)
        return hidden, contexts, frames

    def _announce(self, contexts: Sequence[Any], layer: int, batch: int) -> None:
        """Has the keys and values brought that are wanted next."""
        layer, batch = layer + batch // len(contexts), batch % len(contexts)
        if layer < len(self._spec.layers):
            contexts[batch].prefetch(layer)

    def with_parameters(self, use: Callable[[ParameterSource], object]) -> None:
        """See `Executor.with_parameters`.

        Raises:
            ConfigError: always, for nothing has all of them.
        """
        raise ConfigError("an engine with offload leaves its weights on disk; `jdsi convert` writes them anew")

    def stream_report(self) -> StreamReport | None:
        """See `Executor.stream_report`."""
        report, kv = self._weights.report(), self._cache.report()
        if report is None and kv is None:
            return None
        report = report or StreamReport()
        report.passes = self._passes
        if kv is not None:
            report.kv_bytes_read, report.kv_bytes_written = kv.bytes_read, kv.bytes_written
            report.kv_wait_seconds = kv.wait_seconds
        return report

    def close(self) -> None:
        """See `Executor.close`; stops reading ahead."""
        self._weights.close()
        self._cache.close()
