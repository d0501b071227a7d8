"""The executor for models larger than memory: one compiled layer, weights that arrive while others compute."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jdsi.converters import ParameterSource
from jdsi.converters.block_store import Block, BlockStore
from jdsi.converters.direct_io import PageBuffer
from jdsi.errors import CapacityError, ConfigError
from jdsi.kv_cache import ContiguousContext, PackedContext
from jdsi.models import TransformerSpec
from jdsi.models.parts import tied_table
from jdsi.models.tensor_parallel import local_spec
from jdsi.pallas_kernels.operator import Implementation
from jdsi.sharding import DATA, TENSOR, Parallelism, make_mesh

from .executor import Step
from .kv_demand import kv_bytes
from .kv_offload import OffloadedContext, OffloadedKV, SlabStore
from .layer_programs import LayerPrograms, LayerRun
from .one_process import OneProcess
from .placement import Streamed, kept_weights, streamed_weights
from .residency import Residency
from .waiting import Waiting
from .weight_sources import BlockSource, DiskSource
from .weight_stream import Delivery, StreamReport, WeightStream


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
        kv: where keys and values lie between the turns of their layers; by default they stay on the devices. Closed
            with the executor.
        devices_per_link: see `OffloadedKV`.
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
        kv: SlabStore | None = None,
        devices_per_link: int = 1,
        park: bool = False,
        implementation: Implementation | None = None,
    ) -> None:
        store.check_dtypes()
        self.mesh = make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
        self._spec = store.spec
        self._dtype = jnp.dtype(store.dtype if dtype is None else dtype)
        self.residency, self._batches_per_pass = residency, batches_per_pass
        self._kv, self._devices_per_link, self._park = kv, devices_per_link, park
        self._kv_limit = kv_limit
        programs = LayerPrograms(store.spec, self.mesh, self._dtype, implementation)
        weights = {name: streamed_weights(store.spec, block, self.mesh) for name, block in store.blocks.items()}
        with contextlib.closing(DiskSource(store)) as disk:
            self._resident = {
                name: _load(disk, store.blocks[name], weights[name], programs) for name in residency.resident
            }
        blocks = [(store.blocks[name], weights[name]) for name in residency.streamed]
        self._stream = WeightStream(source or DiskSource(store), blocks, residency.slots) if blocks else None
        self._turn, self._passes = threading.Lock(), 0
        used = {name: kept_weights(own) if name in residency.resident else own for name, own in weights.items()}
        # In the order in which they arrive.
        self._top_blocks = ["norm"] * ("norm" in used)
        self._top_blocks += ["embedding"] * (tied_table(store.spec) is not None) + ["head"] * ("head" in used)
        self._embed = programs.embed(used["embedding"])
        self._layers = [LayerRun.of(programs, used[f"layers.{i}"], layer) for i, layer in enumerate(store.spec.layers)]
        top = [used[name] for name in self._top_blocks]
        self._top, self._logits = programs.top(top), programs.logits(top)
        self._rows = NamedSharding(self.mesh, PartitionSpec(DATA))
        ranks = self.mesh.shape[TENSOR]
        self._local = local_spec(store.spec, ranks)
        self._heads = [(count * ranks, k, v) for count, k, v in self._local.kv_heads]
        create = partial(ContiguousContext.create, self._heads, dtype=self._dtype)
        places = jax.tree.map(partial(NamedSharding, self.mesh), jax.eval_shape(partial(create, 1, 1)).partition())
        self._create = jax.jit(create, static_argnums=(0, 1), out_shardings=places)

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

    def new_context(self, rows: int, capacity: int) -> ContiguousContext | OffloadedContext:
        """See `Executor.new_context`."""
        if self._kv is None:
            self._check_kv(rows, capacity)
            return self._create(rows, capacity)
        link = self._devices_per_link
        kv = OffloadedKV(self._heads, rows, capacity, self._dtype, self.mesh, self._kv, devices_per_link=link)
        return OffloadedContext.empty(kv)

    def _check_kv(self, rows: int, capacity: int) -> None:
        if self._kv_limit is None:
            return
        own = kv_bytes(self._local, capacity, self._dtype) * rows
        whole = own * self.mesh.shape[TENSOR]
        here = whole if jax.default_backend() == "cpu" else -(-whole // self.mesh.size)
        if here > self._kv_limit:
            raise CapacityError(
                f"keys and values of {rows} rows of {capacity} tokens take {here:,} bytes, and the memory limit leaves "
                f"{self._kv_limit:,}; lower max_batch_size, generate less at once, raise memory_limit or set kv_offload"
            )

    def steps(self, batches: Sequence[Step]) -> list[tuple[Any, Any, Any]]:
        """See `Executor.steps`; every layer is used for all batches in turn (zig-zag). One thread at a time."""
        with self._turn:
            hidden, contexts = self._through_layers(batches)
            results = []
            with self._top_weights() as (arrays, held):
                for i, batch in enumerate(batches):
                    result, carry, done = self._top(arrays, hidden.take(i), batch.last, batch.epilogue, batch.carry)
                    results.append((result, contexts[i].commit(), carry))
                    for block in held:
                        block.used_by(done)
            return results

    def logits(
        self, tokens: Int[Array, "B S"], lengths: Int[Array, " B"], token_types: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S V"]:
        """See `Executor.logits`."""
        rows, length = tokens.shape
        padded = -(-rows // self.row_multiple) * self.row_multiple

        def fill(x: Any) -> np.ndarray:
            return np.pad(np.asarray(x), [(0, padded - rows), *[(0, 0)] * (np.ndim(x) - 1)], mode="edge")

        context = PackedContext.from_dense(padded, length, jnp.asarray(fill(lengths)))
        types = None if token_types is None else fill(token_types).reshape(-1)
        step = Step(fill(tokens).reshape(-1), context, None, _unused, (), types)
        with self._turn:
            hidden, _ = self._through_layers([step])
            with self._top_weights() as (arrays, held):
                out, done = self._logits(arrays, hidden.take(0))
                for block in held:
                    block.used_by(done)
        return out.reshape(padded, length, -1)[:rows]

    def _through_layers(self, batches: Sequence[Step]) -> tuple[Waiting, list[Any]]:
        self._passes += 1
        contexts = [batch.context for batch in batches]
        # Each is put in its place once for all layers, whose programs would otherwise do it, and be compiled for it.
        frames = [jax.device_put(context.only(()), self._rows) for context in contexts]
        hidden = Waiting(len(batches), self._rows, park=self._park and len(batches) > 2)
        self._announce(contexts, 0, 0)
        with self._block("embedding") as block:
            for i, (batch, frame) in enumerate(zip(batches, frames, strict=True)):
                tokens = jax.device_put(batch.tokens, self._rows)
                x, done = self._embed(block.arrays, tokens, frame, batch.token_types)
                hidden.put(i, x)
                block.used_by(done)
        done = None
        for index, layer in enumerate(self._layers):
            with self._block(f"layers.{index}") as block:
                arrays, run = layer.for_batches(len(batches), block.arrays, after=done)
                for i, frame in enumerate(frames):
                    memory = contexts[i].memory(index)
                    self._announce(contexts, index, i + 1)
                    x, memory, done = run(arrays, hidden.take(i), memory, frame)
                    hidden.put(i, x)
                    contexts[i] = contexts[i].with_memory(index, memory)
                    block.used_by(done)
        return hidden, contexts

    def _announce(self, contexts: Sequence[Any], layer: int, batch: int) -> None:
        """Has the keys and values brought that are wanted next."""
        layer, batch = layer + batch // len(contexts), batch % len(contexts)
        if layer < len(self._layers) and isinstance(contexts[batch], OffloadedContext):
            contexts[batch].prefetch(layer)

    @contextlib.contextmanager
    def _top_weights(self) -> Iterator[tuple[list[Any], list["Delivery | _Resident"]]]:
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(self._block(name)) for name in self._top_blocks]
            yield [block.arrays for block in held], held

    @contextlib.contextmanager
    def _block(self, name: str) -> Iterator["Delivery | _Resident"]:
        if name in self._resident or self._stream is None:
            yield _Resident(self._resident[name])
            return
        delivery = self._stream.take(name)
        try:
            yield delivery
        finally:
            delivery.release()

    def with_parameters(self, use: Callable[[ParameterSource], object]) -> None:
        """See `Executor.with_parameters`.

        Raises:
            ConfigError: always, for nothing has all of them.
        """
        raise ConfigError("an engine with offload leaves its weights on disk; `jdsi convert` writes them anew")

    def stream_report(self) -> StreamReport | None:
        """See `Executor.stream_report`."""
        if self._stream is None and self._kv is None:
            return None
        report = StreamReport() if self._stream is None else dataclasses.replace(self._stream.report)
        report.passes = self._passes
        if self._kv is not None:
            kv = self._kv.report()
            report.kv_bytes_read, report.kv_bytes_written = kv.bytes_read, kv.bytes_written
            report.kv_wait_seconds = kv.wait_seconds
        return report

    def close(self) -> None:
        """See `Executor.close`; stops reading ahead."""
        if self._stream is not None:
            self._stream.close()
        if self._kv is not None:
            self._kv.close()


def _load(disk: DiskSource, block: Block, weights: Streamed, programs: LayerPrograms) -> dict[str, Array]:
    """A block's parameters, to stay; on a CPU, if stored as they are used, in the memory they are read into."""
    arrays = disk.begin(block, PageBuffer(weights.memory_bytes(block.nbytes)).bytes, weights)()
    if weights.mesh.size == 1 and not block.form.made_bytes(programs.dtype):
        return arrays
    parameters, _ = programs.keep(weights, kept_weights(weights))(arrays)
    return jax.block_until_ready(parameters)


def _unused(logits: Float[Array, "T V"], carry: Any) -> tuple[Float[Array, "T V"], Any]:
    return logits, carry


@dataclasses.dataclass(frozen=True)
class _Resident:
    """Stands for a `Delivery` where the block never leaves."""

    arrays: Any

    def used_by(self, result: Array) -> None:
        """Nothing waits for it."""
