"""The executor for models larger than memory: one compiled layer, weights that arrive while others compute."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jdsi.converters import ParameterSource
from jdsi.converters.block_store import Block, BlockStore
from jdsi.converters.buffers import aligned_copy
from jdsi.converters.direct_io import PageBuffer
from jdsi.converters.sources import recast
from jdsi.errors import ConfigError
from jdsi.kv_cache import AttentionContext, PackedContext
from jdsi.models import TransformerSpec
from jdsi.models.parts import Part, embedding_part, layer_part, tied_table, top_part
from jdsi.models.spec import LayerSpec
from jdsi.pallas_kernels.operator import Implementation, default_implementation

from .executor import Epilogue, Step
from .one_device import OneDevice
from .residency import Residency
from .weight_stream import BlockSource, Delivery, DiskSource, StreamReport, WeightStream, device_memory


class StreamedExecutor(OneDevice):
    """See `Executor`. Weights are where `residency` says; each pass reads every streamed block once.

    Attributes:
        residency: what stays in memory.
    """

    def __init__(
        self,
        store: BlockStore,
        residency: Residency,
        *,
        dtype: Any = None,
        source: BlockSource | None = None,
        batches_per_pass: int = 1,
        implementation: Implementation | None = None,
    ) -> None:
        store.check_dtypes()
        self._spec = store.spec
        stored = next(iter(store.blocks["layers.0"].fields.values())).dtype
        self._dtype = jnp.dtype(stored if dtype is None else dtype)
        self.residency, self._batches_per_pass = residency, batches_per_pass
        with contextlib.closing(DiskSource()) as disk:
            self._resident = {name: self._load(disk, store.blocks[name]) for name in residency.resident}
        blocks = [store.blocks[name] for name in residency.streamed]
        self._stream = WeightStream(source or DiskSource(), blocks, residency.slots) if blocks else None
        self._turn = threading.Lock()
        tied = tied_table(store.spec)
        top = [name for name in ("norm", "head") if name in store.blocks]
        # In the order in which they arrive.
        self._top_blocks = ["norm"] * ("norm" in top) + ["embedding"] * (tied is not None) + ["head"] * ("head" in top)
        self._programs = _Programs(store.spec, self._dtype, implementation)

    def _load(self, source: DiskSource, block: Block) -> dict[str, Array]:
        arrays = source.read(block, PageBuffer(block.nbytes).bytes)
        if block.rearrangements:  # their memory holds the stored layout as well
            arrays = {name: aligned_copy(array) for name, array in arrays.items()}
        # On the CPU JAX uses this memory as it is; nothing writes to it again.
        return jax.device_put(
            {name: recast(array, self._dtype, name) for name, array in arrays.items()}, device_memory()
        )

    @property
    def spec(self) -> TransformerSpec:
        """The model's."""
        return self._spec

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of activations; weights are cast to it as they are used."""
        return self._dtype

    @property
    def runs_ahead(self) -> bool:
        """See `Executor.runs_ahead`."""
        return False

    @property
    def batches_per_pass(self) -> int:
        """See `Executor.batches_per_pass`."""
        return self._batches_per_pass

    def steps(self, batches: Sequence[Step]) -> list[tuple[Any, Any, Any]]:
        """See `Executor.steps`; every layer is used for all batches in turn (zig-zag). One thread at a time."""
        with self._turn:
            return self._pass(batches)

    def _pass(self, batches: Sequence[Step]) -> list[tuple[Any, Any, Any]]:
        run, contexts = self._programs, [b.context for b in batches]
        with self._block("embedding") as block:
            hidden = []
            for batch in batches:
                tokens = jnp.asarray(batch.tokens)
                x, done = run.embed(block.arrays, tokens, batch.context.positions, batch.token_types)
                hidden.append(x)
                block.used_by(done)
        for index, layer in enumerate(self._spec.layers):
            with self._block(f"layers.{index}") as block:
                for i, context in enumerate(contexts):
                    hidden[i], memory, done = run.layer(
                        _inside(block.arrays, f"layers.{index}."),
                        hidden[i],
                        context.memory(index),
                        context.only(()),
                        layer,
                    )
                    contexts[i] = context.with_memory(index, memory)
                    block.used_by(done)
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(self._block(name)) for name in self._top_blocks]
            arrays = {name: array for block in held for name, array in block.arrays.items()}
            results = []
            for i, batch in enumerate(batches):
                result, carry, done = run.top(arrays, hidden[i], batch.last, batch.epilogue, batch.carry)
                results.append((result, contexts[i].commit(), carry))
                for block in held:
                    block.used_by(done)
        return results

    def logits(
        self, tokens: Int[Array, "B S"], lengths: Int[Array, " B"], token_types: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S V"]:
        """See `Executor.logits`."""
        batch, length = tokens.shape
        context = PackedContext.from_dense(batch, length, lengths)
        types = None if token_types is None else token_types.reshape(-1)
        ((out, _, _),) = self.steps([Step(tokens.reshape(-1), context, None, _as_they_are, (), types)])
        return out.reshape(batch, length, -1)

    def with_parameters(self, use: Callable[[ParameterSource], object]) -> None:
        """See `Executor.with_parameters`.

        Raises:
            ConfigError: always, for nothing has all of them.
        """
        raise ConfigError("an engine with offload leaves its weights on disk; `jdsi convert` writes them anew")

    def stream_report(self) -> StreamReport | None:
        """See `Executor.stream_report`."""
        return None if self._stream is None else dataclasses.replace(self._stream.report)

    def close(self) -> None:
        """See `Executor.close`; stops reading ahead."""
        if self._stream is not None:
            self._stream.close()

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


def _as_they_are(logits: Float[Array, "T V"], carry: Any) -> tuple[Float[Array, "T V"], Any]:
    return logits, carry


def _inside(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): array for name, array in arrays.items()}


@dataclasses.dataclass(frozen=True)
class _Resident:
    """Stands for a `Delivery` where the block never leaves."""

    arrays: Mapping[str, Array]

    def used_by(self, result: Array) -> None:
        """Nothing waits for it."""


class _Programs:
    """The compiled pieces of a model: one program per kind of layer, not per layer.

    What each returns is given away to the next one or the caller, so each also returns a number that tells when it is
    done.
    """

    def __init__(self, spec: TransformerSpec, dtype: jnp.dtype, implementation: Implementation | None) -> None:
        parts = {layer: layer_part(spec, layer, dtype) for layer in dict.fromkeys(spec.layers)}
        embedding, top, table = embedding_part(spec, dtype), top_part(spec, dtype), tied_table(spec)

        def cast(part: Part, arrays: Mapping[str, Array], prefix: str = "") -> list[Array]:
            return [a.astype(dtype) for a in part.pick(arrays, prefix)]

        @jax.jit
        def embed(
            arrays: Mapping[str, Array], tokens: Array, positions: Array, token_types: Array | None
        ) -> tuple[Array, Array]:
            with default_implementation(implementation):
                x = embedding.build(cast(embedding, arrays, "embedding."))(tokens, positions, token_types)
            return x, x[0, 0]

        @partial(jax.jit, static_argnames="layer", donate_argnames=("hidden", "memory"))
        def run_layer(
            arrays: Mapping[str, Array], hidden: Array, memory: Any, frame: AttentionContext, layer: LayerSpec
        ) -> tuple[Array, Any, Array]:
            part = parts[layer]
            with default_implementation(implementation):
                hidden, context = part.build(cast(part, arrays))(hidden, frame.only(memory))
            return hidden, context.memory(0), hidden[0, 0]

        @partial(jax.jit, static_argnames="epilogue", donate_argnames="carry")
        def run_top(
            arrays: Mapping[str, Array], hidden: Array, last: Array | None, epilogue: Epilogue, carry: Any
        ) -> tuple[Any, Any, Array]:
            shared = None if table is None else arrays[table].astype(dtype)
            with default_implementation(implementation):
                logits = top.build(cast(top, arrays))(hidden, last, shared)
            return *epilogue(logits, carry), logits[0, 0]

        self.embed, self.layer, self.top = embed, run_layer, run_top
