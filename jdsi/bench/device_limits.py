"""What the device gives to programs that only copy or only multiply, measured like the operators beside it."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jdsi.pallas_kernels.operator import ArgumentSpec, Arrays

from .calls import Calls, Operands


@dataclasses.dataclass(frozen=True)
class DeviceLimits:
    """A copy and a matrix product, both on random values, for zeros run faster.

    Attributes:
        copy_bytes: of the array that is copied: read once, written once.
        size: rows and columns of the factors.
        dtype: of the factors.
    """

    copy_bytes: int
    size: int
    dtype: str

    @classmethod
    def of(cls, platform: str) -> "DeviceLimits":
        """Sizes at which a GPU, or a CPU, reaches its best rates."""
        if platform == "cpu":  # whose units for bfloat16, if any, XLA does not use well
            return cls(2**27, 2048, "float32")
        return cls(2**30, 8192, "bfloat16")

    def contenders(self) -> dict[str, Callable[[], float]]:
        """`copy` and `matmul`, to be timed in turn with others; each returns seconds."""

        def vector(key: jax.Array) -> Arrays:
            return (jax.random.bits(key, (self.copy_bytes // 4,), jnp.uint32),)

        def factors(key: jax.Array) -> Arrays:
            shape = (2, self.size, self.size)
            return tuple(jax.random.normal(key, shape, jnp.dtype(self.dtype)))

        data = Operands(ArgumentSpec("copy", vector, 2 * self.copy_bytes, 0), 1)
        # The driver's copy and a kernel of XLA's; which is faster differs between devices.
        copies = [Calls(function, data) for function in (jnp.copy, jnp.invert)]
        product = Calls(jnp.matmul, Operands(ArgumentSpec("matmul", factors, 0, 0), 1))
        return {"copy": lambda: min(copy.seconds() for copy in copies), "matmul": product.seconds}

    def bandwidths(self, seconds: Sequence[float]) -> list[float]:
        """Bytes per second of the copies that took so long."""
        return [2 * self.copy_bytes / s for s in seconds]

    def rates(self, seconds: Sequence[float]) -> list[float]:
        """Floating-point operations per second of the products that took so long."""
        return [2 * self.size**3 / s for s in seconds]
