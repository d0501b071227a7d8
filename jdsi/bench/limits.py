"""What the hardware gives to a program that does nothing but the arithmetic."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jdsi.models import Transformer, parameters


def product_weights(model: Transformer) -> list[Array]:
    """The matrices that every token is multiplied with, `[out, in]`, the head last; a tied head is the embedding.

    Embedding tables are not among them: a token reads one row of those.
    """
    named = parameters(model)
    matrices = {name: w for name, w in named.items() if w.ndim == 2 and not name.startswith("embedding.")}
    head = matrices.pop("head.weight", named["embedding.tokens.weight"])
    return [*matrices.values(), head]


def weight_bytes(weights: Sequence[Array]) -> int:
    """Bytes of matrices: what decoding one token for every row of a batch has to read at least once."""
    return sum(w.size * w.dtype.itemsize for w in weights)


# Float32 products in full: a GPU would otherwise use TF32, which the engine does not.
_product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class Chain:
    """A bare chain of XLA matrix products with a model's own matrices, and nothing else.

    Every product's input depends a little on the one before, so none can be left out, reordered or merged.
    """

    weights: Sequence[Array]
    rows: int

    def compiled(self) -> Callable[[], None]:
        """One pass over all matrices with `rows` vectors, as a function that returns when it is done."""
        widest = max(w.shape[1] for w in self.weights)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((self.rows, widest)), self.weights[0].dtype)
        program = jax.jit(chain_products).lower(x, list(self.weights)).compile()

        def run() -> None:
            program(x, list(self.weights)).block_until_ready()

        return run


def chain_products(x: Float[Array, "N I"], weights: list[Array]) -> Float[Array, ""]:
    """The program of `Chain`; `x` is as wide as the widest input."""
    y = x
    for weight in weights:
        width = weight.shape[1]
        fed = jnp.tile(y, (1, -(-width // y.shape[1])))[:, :width]
        # Clipped and small: random weights must lead neither to infinity nor to denormals, which are slow.
        fed = x[:, :width] + 1e-3 * jnp.clip(fed, -1, 1)
        y = _product(weight, fed[0])[None] if len(fed) == 1 else _product(fed, weight.T)
    return y.sum()


@dataclasses.dataclass(frozen=True)
class LargeMatmul:
    """The rate of one large square float32 matrix product on random values (zeros run faster).

    Attributes:
        size: rows and columns of both factors.
    """

    size: int = 2048

    @property
    def flops(self) -> int:
        """Floating-point operations of one product."""
        return 2 * self.size**3

    def compiled(self) -> Callable[[], None]:
        """One product, as a function that returns when it is done."""
        rng = np.random.default_rng(0)
        a, b = (jnp.asarray(rng.standard_normal((self.size, self.size), np.float32)) for _ in range(2))
        program = jax.jit(_product).lower(a, b).compile()

        def run() -> None:
            program(a, b).block_until_ready()

        return run
