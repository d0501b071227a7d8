"""Memory of one device, counted from a model's spec alone."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from jdsi.kv_cache import Contiguous
from jdsi.models import TransformerSpec
from jdsi.models.spec import LayerSpec
from jdsi.models.work import Workload
from jdsi.sharding import Parallelism

from .shares import even_stages, share_of, weight_bytes


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one device needs.

    Attributes:
        weights: of its stage.
        kv: keys and values of all sequences of its data-parallel group, at their full length.
        activations: arrays that live only during a pass, an estimate.
        logits: and what sampling makes of them.
    """

    weights: int
    kv: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.activations + self.logits


def stage_memory(
    spec: TransformerSpec,
    parallelism: Parallelism,
    work: Workload,
    *,
    rows: int,
    capacity: int,
    dtype: DTypeLike = "bfloat16",
    stages: Sequence[range] | None = None,
) -> tuple[Memory, ...]:
    """What a device of each pipeline stage needs.

    Args:
        spec: the model's.
        parallelism: degrees.
        work: the micro-batch with the most tokens that a data-parallel group ever runs.
        rows: sequences of the group, all micro-batches together.
        capacity: tokens that the cache of each sequence has room for.
        dtype: of weights, activations and KV cache.
        stages: layers of each, by default `even_stages`.

    Raises:
        ConfigError: there are more stages than layers.
    """
    share, item = share_of(spec, parallelism.tensor), jnp.dtype(dtype).itemsize
    found = []
    for layers in stages or even_stages(spec, parallelism.pipeline):
        specs = [share.spec.layers[i] for i in layers]
        last = layers.stop == len(share.spec.layers) and share.spec.head is not None
        found.append(
            Memory(
                weights=weight_bytes(share.stage(layers), dtype),
                kv=Contiguous().bytes(share.spec.kv_shapes[layers.start : layers.stop], rows, capacity, dtype),
                activations=work.tokens * max(_live(spec.width, one) for one in specs) * item,
                # As they come, and once more while they are worked on.
                logits=2 * 4 * work.rows * share.spec.vocab_size if last else 0,
            )
        )
    return tuple(found)


def _live(width: int, layer: LayerSpec) -> int:
    """Numbers of each token that a layer holds at once: the residual stream, a sum, and the widest product's two sides.

    Between 0.9 and 1.2 of what XLA sets aside for prompts of large models on Hopper's kernels (GPT-J: 0.7).
    """
    return 2 * width + max(2 * width, *(one.live(width) for one in layer.sublayers))
