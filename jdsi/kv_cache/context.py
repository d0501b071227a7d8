"""The attention context: what ties packed tokens to sequences."""

from typing import Any, Protocol, Self

from jaxtyping import Array, Float, Int

from jdsi.pallas_kernels import AttentionForm


class AttentionContext(Protocol):
    """Knows the position of every packed token and owns the KV memory; a pytree.

    The Transformer is written once against this protocol. Everything that differs between a dense batch, a packed one,
    a paged or a compressed cache lives in implementations of it.
    """

    @property
    def positions(self) -> Int[Array, " T"]:
        """Position of each packed token within its sequence."""
        ...

    def attend(
        self,
        layer: int,
        q: Float[Array, "T H D"],
        k: Float[Array, "T K D"],
        v: Float[Array, "T K Dv"],
        form: AttentionForm,
    ) -> tuple[Float[Array, "T H Dv"], Self]:
        """Attention of the packed tokens in layer `layer`, and the context with their keys and values remembered.

        q and k come unrotated: the context applies `form.rotary`, for a policy may place keys elsewhere than they were
        read. The layers of one forward call `attend` in order, each with the context the one before returned.
        """
        ...

    def attend_fused(
        self, layer: int, qkv: Float[Array, "T H+2*K D"], num_heads: int, form: AttentionForm
    ) -> tuple[Float[Array, "T H D"], Self]:
        """`attend` where q's `num_heads` heads, then k's, then v's are one array, as one projection gave them.

        A context that writes to memory can take them from there: cut out, each would first be copied.
        """
        ...

    def commit(self) -> Self:
        """The context after the last layer of a call: the call's tokens are now part of their sequences."""
        ...

    def partition(self) -> Self:
        """How each array is divided inside `jax.shard_map`: this pytree, a `PartitionSpec` in place of each."""
        ...

    def memory(self, layer: int) -> Any:
        """What the context holds of one layer, a pytree: all that `attend` for that layer changes."""
        ...

    def only(self, memory: Any) -> Self:
        """This context with `memory` as that of its only layer, layer 0: for executors that run layer by layer."""
        ...

    def with_memory(self, layer: int, memory: Any) -> Self:
        """This context with another memory of one layer."""
        ...
