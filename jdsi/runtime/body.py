"""The program of a part of a model, which every executor wraps in its own way."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array

from jdsi.kv_cache import AttentionContext
from jdsi.models import Part, Skeleton, Transformer, TransformerSpec
from jdsi.models.tensor_parallel import SEQUENCE_PARALLEL_TOKENS, local_spec, without_padding
from jdsi.pallas_kernels.operator import Implementation, default_implementation
from jdsi.sharding import DATA, axis_index

from .epilogue import Epilogue


@dataclasses.dataclass(frozen=True, eq=False)  # jit knows it by what it is, not by what is in it
class Body:
    """A part's forward pass, and behind the last part the epilogue: to be jitted, inside `jax.shard_map` or not.

    Attributes:
        skeleton: the part, as one rank of the axis "tensor" holds it.
        part: which it is.
        spec: the whole model's.
        implementation: what operators run, see `default_implementation`.
        ranks: of the axis "tensor".
        sequence_parallel: divide the tokens of the residual stream over "tensor"; by default where they are many.
    """

    skeleton: Skeleton[Transformer]
    part: Part
    spec: TransformerSpec
    implementation: Implementation | None = None
    ranks: int = 1
    sequence_parallel: bool | None = None

    @classmethod
    def of(cls, spec: TransformerSpec, part: Part, dtype: Any, ranks: int = 1, **options: Any) -> "Body":
        """The part's of a model that is divided among so many ranks; `options` are attributes."""
        return cls(Transformer.skeleton(local_spec(spec, ranks), part, dtype), part, spec, ranks=ranks, **options)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters it takes, in order, as the whole model calls them."""
        return tuple(self.skeleton.abstract)

    def pick(self, parameters: Mapping[str, Array]) -> list[Array]:
        """The part's parameters out of those of more parts, in order."""
        return [parameters[name] for name in self.names]

    def divides(self, tokens: int) -> bool:
        """Whether so many tokens of a data-parallel group are divided over "tensor" between products."""
        wanted = tokens >= SEQUENCE_PARALLEL_TOKENS if self.sequence_parallel is None else self.sequence_parallel
        return wanted and self.ranks > 1 and tokens % self.ranks == 0

    def __call__(
        self,
        leaves: list[Array],
        x: Array,
        context: AttentionContext,
        token_types: Array | None,
        wanted: Array | None,
        carry: Any,
        epilogue: Epilogue,
        classify: bool,
    ) -> tuple[Any, AttentionContext, Any]:
        """What `Transformer.run` gives, or of the last part what the epilogue makes of it; the context; the carry.

        Args:
            leaves: the parameters.
            x, context, token_types: as in `Transformer.run`.
            wanted: index in the tokens of the whole batch.
            carry, epilogue, classify: see `Step`.
        """
        tokens = context.positions.shape[0]
        if wanted is not None:
            wanted = wanted - axis_index(DATA) * tokens
        model = self.skeleton.build(leaves)
        with default_implementation(self.implementation):
            out, context = model.run(
                x,
                context,
                token_types,
                wanted=wanted,
                output="classes" if classify else "logits",
                divide=self.divides(tokens),
            )
        if not self.part.last:
            return out, context, carry
        if not classify and self.spec.head is not None:
            out = without_padding(out, self.spec.vocab_size)
        result, carry = epilogue(out, carry)
        return result, context, carry
