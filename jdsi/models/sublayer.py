"""What a sublayer is: the contract of specs and modules that every kind keeps, and that nothing else needs to know."""

import abc
from collections.abc import Iterator
from typing import ClassVar, Protocol, Self

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jdsi.kv_cache import AttentionContext
from jdsi.layers import Norm, Sum

from .work import Operation, Work

Hidden = Float[Array, "T E"]


class Sublayer(Protocol):
    """The module of a sublayer."""

    def __call__(self, x: Hidden, context: AttentionContext, *, norm: Norm | None) -> tuple[Sum, AttentionContext]:
        """What it adds to the residual stream, for `norm(x)` of all tokens, and the context that has seen them.

        Inside `jax.shard_map` the sum is a rank's share of it: shares are added up over the axis "tensor".
        """
        ...


class SublayerSpec(abc.ABC):
    """A sublayer as data: a frozen dataclass, for layers of a kind are equal and share their programs.

    Attributes:
        name: of the sublayer in its layer; stands in front of its parameters' names.
        causal: whether no token depends on a later one.
    """

    name: ClassVar[str]
    causal: bool = True

    @abc.abstractmethod
    def build(self, width: int, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Sublayer:
        """Its module, a `flax.nnx.Module`; `layer` is that of the context whose keys and values it uses."""

    @abc.abstractmethod
    def share(self, ranks: int) -> Self:
        """What one of so many ranks of the axis "tensor" computes; the same for every rank, smaller ones are padded."""

    @abc.abstractmethod
    def work(self, width: int, work: Work) -> Iterator[Operation]:
        """What a device does for it, kernel by kernel; of a rank's share where this is one."""

    @abc.abstractmethod
    def live(self, width: int) -> int:
        """Numbers of each token that its widest product holds at once, on both sides."""

    @property
    def kv_heads(self) -> tuple[int, int, int] | None:
        """`(num_kv_heads, key dim, value dim)` of the keys and values it attends to, if it does."""
        return None

    @property
    def most_ranks(self) -> int | None:
        """Among how many ranks it can be divided so that each has something to do; `None` where it does not matter."""
        return None
