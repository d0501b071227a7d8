"""One pipeline stage compiled for its mesh: consecutive layers inside one `jax.shard_map`."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jdsi.kv_cache import AttentionContext, ContiguousContext, PackedContext
from jdsi.layers import rows_of_parts
from jdsi.models import TransformerSpec, abstract_parameters
from jdsi.models.stage import stage_part
from jdsi.models.tensor_parallel import SEQUENCE_PARALLEL_TOKENS, local_spec, split_of, without_padding
from jdsi.pallas_kernels.operator import Implementation, default_implementation
from jdsi.sharding import DATA, TENSOR, all_gather, axis_index, axis_size, own_part

from .executor import Epilogue, carry_specs

_ROWS, _WHOLE = PartitionSpec(DATA), PartitionSpec()


@dataclasses.dataclass(frozen=True)
class StageInput:
    """What one stage's forward pass takes besides its parameters.

    Attributes:
        x: token ids `[T]` for the first stage, hidden states for others.
        context: which token belongs where, with the memory of this stage's layers.
        token_types: segment ids, for the first stage.
        wanted: for the last stage, index in the batch's tokens of those whose logits are wanted; `None` for all.
        carry: the epilogue's state, for the last stage.
    """

    x: Any
    context: Any
    token_types: Any = None
    wanted: Any = None
    carry: Any = ()


jax.tree_util.register_dataclass(StageInput)


class StageProgram:
    """The layers `layers` of a model over a mesh with the axes "data", "expert" and "tensor".

    Rows of a batch are divided over "data", heads, hidden units and the vocabulary over "tensor". The collectives are
    those that the layers call.

    Attributes:
        mesh: where it runs.
        names: of the parameters it takes, in order, as the whole model calls them.
        first, last: whether it holds the embedding; norm and head.
    """

    def __init__(
        self,
        spec: TransformerSpec,
        layers: range,
        mesh: Mesh,
        dtype: Any,
        *,
        implementation: Implementation | None = None,
        sequence_parallel: bool | None = None,
    ) -> None:
        ranks = mesh.shape[TENSOR]
        self.spec, self.layers, self.mesh, self.dtype = spec, layers, mesh, jnp.dtype(dtype)
        self.first, self.last = layers.start == 0, layers.stop == len(spec.layers)
        self._implementation: Implementation | None = implementation
        self._sequence_parallel = sequence_parallel
        local = local_spec(spec, ranks)
        self._part = stage_part(local, layers, dtype)
        self._kv_heads = [(heads * ranks, k, v) for heads, k, v in local.kv_heads[layers.start : layers.stop]]
        self.names = self._part.names
        splits = [split_of(spec, name, ranks) for name in self.names]
        self._leaf_specs = [_WHOLE if s is None else PartitionSpec(*[None] * s.dim, TENSOR) for s in splits]
        passed_on = () if self.first or self.last else ("hidden",)
        self._jitted = jax.jit(
            self._step, static_argnames=("epilogue", "classify"), donate_argnames=("context", "carry", *passed_on)
        )
        self._forward_jitted = jax.jit(self._forward, static_argnames=("length",), donate_argnames=passed_on)
        create = partial(ContiguousContext.create, self._kv_heads, dtype=self.dtype)
        split = jax.eval_shape(partial(create, 1, 1)).partition()
        self._create = jax.jit(create, static_argnums=(0, 1), out_shardings=jax.tree.map(self.sharding, split))

    def sharding(self, spec: PartitionSpec = _WHOLE) -> NamedSharding:
        """A sharding on this stage's mesh."""
        return NamedSharding(self.mesh, spec)

    def parameters(self, arrays: Mapping[str, Array]) -> list[Array]:
        """This stage's parameters out of a model's, in order."""
        return [arrays[name] for name in self.names]

    def new_context(self, rows: int, capacity: int) -> ContiguousContext:
        """Empty memory of this stage's layers, every device's share made where it lies."""
        return self._create(rows, capacity)

    def hidden_spec(self, tokens: int) -> PartitionSpec:
        """How the hidden states of `tokens` packed tokens lie between stages."""
        return PartitionSpec((DATA, TENSOR)) if self._splits_tokens(tokens // self.mesh.shape[DATA]) else _ROWS

    def _splits_tokens(self, tokens: int) -> bool:
        """Whether the tokens of one group are divided over "tensor" between products (Korthikanti et al. 2022)."""
        ranks = self.mesh.shape[TENSOR]
        wanted = tokens >= SEQUENCE_PARALLEL_TOKENS if self._sequence_parallel is None else self._sequence_parallel
        return wanted and ranks > 1 and tokens % ranks == 0

    def abstract_parameters(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes and shardings of this stage's parameters, in order."""
        ranks, plain = self.mesh.shape[TENSOR], abstract_parameters(self.spec, self.dtype)
        found = []
        for name, spec in zip(self.names, self._leaf_specs, strict=True):
            split = split_of(self.spec, name, ranks)
            shape = plain[name].shape if split is None else split.global_shape(plain[name].shape)
            found.append(jax.ShapeDtypeStruct(shape, self.dtype, sharding=self.sharding(spec)))
        return found

    def lower(self, rows: int, new_tokens: int, capacity: int, epilogue: Epilogue, carry: Any = ()) -> Any:
        """The step lowered for arguments that do not exist, for `compile()`.

        Args:
            rows: of the batch.
            new_tokens: of each row; more than one is a prompt.
            capacity: tokens that the KV memory holds for each row.
            epilogue, carry: as in `step`; the carry may be abstract.
        """
        tokens, prompt = rows * new_tokens, new_tokens > 1
        context = jax.eval_shape(partial(ContiguousContext.create, self._kv_heads, rows, capacity, self.dtype))
        context = dataclasses.replace(context, new_tokens=new_tokens, empty=prompt)

        def placed(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.sharding(spec))

        hidden = jax.ShapeDtypeStruct((tokens, self.spec.width), self.dtype)
        ids, wanted = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (tokens, rows))
        given = StageInput(
            placed(ids, _ROWS) if self.first else placed(hidden, self.hidden_spec(tokens)),
            jax.tree.map(placed, context, context.partition()),
            wanted=placed(wanted, _ROWS) if self.last and prompt else None,
            carry=self._abstract_carry(carry) if self.last else (),
        )
        return self._jitted.lower(self.abstract_parameters(), *self._arguments(given), epilogue=epilogue)

    def _abstract_carry(self, carry: Any) -> Any:
        specs = carry_specs(carry)
        if isinstance(specs, PartitionSpec):
            specs = jax.tree.map(lambda _: specs, carry)
        return jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.sharding(spec)), carry, specs
        )

    def step(
        self, leaves: list[Array], given: StageInput, epilogue: Epilogue, *, classify: bool = False
    ) -> tuple[Any, AttentionContext, Any]:
        """The stage's forward pass; to `classify`, see `Step`.

        Returns:
            Hidden states, or from the last stage the epilogue's result, the same on every device; the context that has
            seen the tokens; the epilogue's new state.
        """
        lengths = given.context.new_lengths if isinstance(given.context, ContiguousContext) else None
        if isinstance(lengths, np.ndarray):
            # As a step returns it, or the first step behind a prompt would be a program of its own to compile.
            placed = jax.make_array_from_callback(lengths.shape, self.sharding(_ROWS), lambda rows: lengths[rows])
            given = dataclasses.replace(given, context=dataclasses.replace(given.context, new_lengths=placed))
        return self._jitted(leaves, *self._arguments(given), epilogue=epilogue, classify=classify)

    def _arguments(self, given: StageInput) -> tuple[Any, ...]:
        tokens, hidden = (given.x, None) if self.first else (None, given.x)
        return tokens, hidden, given.context, given.token_types, given.wanted, given.carry

    def _step(
        self,
        leaves: list[Array],
        tokens: Array | None,
        hidden: Array | None,
        context: AttentionContext,
        token_types: Array | None,
        wanted: Array | None,
        carry: Any,
        *,
        epilogue: Epilogue,
        classify: bool = False,
    ) -> tuple[Any, AttentionContext, Any]:
        total = context.positions.shape[0]
        carried = carry_specs(carry)
        memory, seen = context.partition(), jax.eval_shape(lambda: context.commit()).partition()

        def body(leaves, tokens, hidden, context, token_types, wanted, carry):
            stage = self._part.build(leaves)
            hidden, context = self._layers(stage, tokens, hidden, context, token_types)
            if not self.last:
                return hidden, context, carry
            count = context.positions.shape[0]
            if wanted is not None:
                wanted = wanted - axis_index(DATA) * count
            outputs = self._outputs(stage, hidden, wanted, count, classify=classify)
            result, carry = epilogue(outputs, carry)
            return result, context, carry

        result, context, carry = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(self._leaf_specs, _ROWS, self.hidden_spec(total), memory, _ROWS, _ROWS, carried),
            out_specs=(_ROWS if self.last else self.hidden_spec(total), seen, carried),
            check_vma=False,
        )(leaves, tokens, hidden, context, token_types, wanted, carry)
        if self.last:  # what is read by the host, and by every device of the first stage
            result = lax.with_sharding_constraint(result, self.sharding())
        return result, context, carry

    def forward(
        self,
        leaves: list[Array],
        x: Array | np.ndarray,
        lengths: Array | np.ndarray,
        token_types: Array | np.ndarray | None,
        length: int,
    ) -> Array:
        """The stage's pass over a right-padded batch of `length` tokens a row, without memory.

        Returns:
            Hidden states `[B * length, E]`; from the last stage the logits of every token, the same on every device.
        """
        tokens, hidden = (x, None) if self.first else (None, x)
        return self._forward_jitted(leaves, tokens, hidden, lengths, token_types, length=length)

    def _forward(
        self,
        leaves: list[Array],
        tokens: Array | None,
        hidden: Array | None,
        lengths: Array,
        token_types: Array | None,
        *,
        length: int,
    ) -> Array:
        total = lengths.shape[0] * length

        def body(leaves, tokens, hidden, lengths, token_types):
            stage = self._part.build(leaves)
            rows = lengths.shape[0]
            context = PackedContext.from_dense(rows, length, lengths)
            context = dataclasses.replace(context, rows=rows * axis_size(DATA))
            hidden, _ = self._layers(stage, tokens, hidden, context, token_types)
            return self._outputs(stage, hidden, None, rows * length) if self.last else hidden

        vocabulary = PartitionSpec(DATA, TENSOR) if self.spec.head else _ROWS
        out = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(self._leaf_specs, _ROWS, self.hidden_spec(total), _ROWS, _ROWS),
            out_specs=vocabulary if self.last else self.hidden_spec(total),
            check_vma=False,
        )(leaves, tokens, hidden, lengths, token_types)
        if self.last:
            out = out[:, : self.spec.vocab_size] if self.spec.head else out
            out = lax.with_sharding_constraint(out, self.sharding())
        return out

    # What follows runs inside `jax.shard_map`.

    def _layers(
        self, stage: Any, tokens: Array | None, hidden: Array | None, context: Any, token_types: Array | None
    ) -> tuple[Array, Any]:
        with default_implementation(self._implementation):
            if hidden is not None:
                return stage.run(hidden, context)
            embedded: Array = stage.embed(tokens, context, token_types)
            if self._splits_tokens(embedded.shape[0]):
                embedded = own_part(embedded, TENSOR)
            return stage.run(embedded, context)

    def _outputs(
        self, stage: Any, hidden: Array, wanted: Array | None, tokens: int, *, classify: bool = False
    ) -> Array:
        """What the classifier gives, or one rank's share of the logits, with padding at minus infinity."""
        if hidden.shape[0] != tokens:
            hidden = all_gather(hidden, TENSOR) if wanted is None else rows_of_parts(hidden, wanted)
            wanted = None
        with default_implementation(self._implementation):
            outputs = stage.finish(hidden, wanted, classify=classify)
        return outputs if classify or self.spec.head is None else without_padding(outputs, self.spec.vocab_size)
