"""One pipeline stage compiled for its mesh: consecutive layers inside one `jax.shard_map`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jdsi.kv_cache import AttentionContext, Cache, CacheSpec, Contiguous
from jdsi.models import Part, TransformerSpec, parameters_of
from jdsi.models.tensor_parallel import kv_shapes
from jdsi.pallas_kernels.operator import Implementation
from jdsi.sharding import DATA, TENSOR

from .body import Body
from .epilogue import Epilogue, EpilogueProgram, carry_specs, left_for_another, result_specs, stands_apart

_ROWS, _WHOLE = PartitionSpec(DATA), PartitionSpec()
_CONTIGUOUS = Contiguous()


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
        cache: CacheSpec = _CONTIGUOUS,
    ) -> None:
        ranks = mesh.shape[TENSOR]
        self.spec, self.layers, self.mesh, self.dtype = spec, layers, mesh, jnp.dtype(dtype)
        part = Part.stage(spec, layers)
        self.first, self.last = part.first, part.last
        self._body = Body.of(
            spec, part, dtype, ranks, implementation=implementation, sequence_parallel=sequence_parallel
        )
        self._cache, self._kv_shapes = cache, kv_shapes(spec, ranks)[layers.start : layers.stop]
        self._epilogues = EpilogueProgram(mesh, divided=spec.head is not None)
        self.names = self._body.names
        splits = [parameters_of(spec)[name].split(ranks) for name in self.names]
        self._leaf_specs = [_WHOLE if s is None else PartitionSpec(*[None] * s.dim, TENSOR) for s in splits]
        passed_on = () if self.first or self.last else ("hidden",)
        self._jitted = jax.jit(
            self._step, static_argnames=("epilogue", "classify"), donate_argnames=("context", "carry", *passed_on)
        )

    def sharding(self, spec: PartitionSpec = _WHOLE) -> NamedSharding:
        """A sharding on this stage's mesh."""
        return NamedSharding(self.mesh, spec)

    def parameters(self, arrays: Mapping[str, Array]) -> list[Array]:
        """This stage's parameters out of a model's, in order."""
        return self._body.pick(arrays)

    def new_cache(self, rows: int, tokens: int) -> Cache:
        """Empty memory of this stage's layers."""
        return self._cache.create(self._kv_shapes, rows, tokens, self.dtype, self.mesh)

    def hidden_spec(self, tokens: int) -> PartitionSpec:
        """How the hidden states of `tokens` packed tokens lie between stages."""
        divided = self._body.divides(tokens // self.mesh.shape[DATA])
        return PartitionSpec((DATA, TENSOR)) if divided else _ROWS

    def abstract_parameters(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes and shardings of this stage's parameters, in order."""
        ranks, infos = self.mesh.shape[TENSOR], parameters_of(self.spec)
        found = []
        for name, spec in zip(self.names, self._leaf_specs, strict=True):
            info, split = infos[name], infos[name].split(ranks)
            shape = info.shape if split is None else split.global_shape(info.shape)
            found.append(jax.ShapeDtypeStruct(shape, info.dtype_in(self.dtype), sharding=self.sharding(spec)))
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

        def begun() -> Any:
            none = jnp.zeros(rows, jnp.int32)
            cache = self._cache.create(self._kv_shapes, rows, capacity, self.dtype)
            return (cache if prompt else cache.rollback(np.zeros(rows, np.int32))).begin(none, new_tokens)

        context = jax.eval_shape(begun)

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
        if not self.last or not stands_apart(epilogue):
            return self._jitted(leaves, *self._arguments(given), epilogue=epilogue, classify=classify)
        arguments = self._arguments(dataclasses.replace(given, carry=()))
        outputs, context, _ = self._jitted(leaves, *arguments, epilogue=left_for_another, classify=classify)
        result, carry = self._epilogues(outputs, given.carry, epilogue)
        return result, context, carry

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
        results = result_specs(epilogue, divided=self.spec.head is not None and not classify)
        memory, seen = context.partition(), jax.eval_shape(lambda: context.commit()).partition()

        def body(leaves, tokens, hidden, context, token_types, wanted, carry):
            x = tokens if self.first else hidden
            return self._body(leaves, x, context, token_types, wanted, carry, epilogue, classify)

        result, context, carry = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(self._leaf_specs, _ROWS, self.hidden_spec(total), memory, _ROWS, _ROWS, carried),
            out_specs=(results if self.last else self.hidden_spec(total), seen, carried),
            check_vma=False,
        )(leaves, tokens, hidden, context, token_types, wanted, carry)
        if (
            self.last and epilogue is not left_for_another
        ):  # what is read by the host, and by every device of the first stage
            result = lax.with_sharding_constraint(result, self.sharding())
        return result, context, carry
