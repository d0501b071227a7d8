"""For tests of what is added to a model from outside: a small one, in plain NumPy too, and executors of all kinds."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jdsi.converters import MemoryParameters, StoredModel
from jdsi.converters.block_store import BlockStore
from jdsi.converters.sharded_loader import from_arrays
from jdsi.converters.streaming import StreamingCheckpoint, write_streaming
from jdsi.models import Transformer, TransformerSpec, parameters
from jdsi.models.spec import AttentionSpec, EmbeddingSpec, HeadSpec, LayerSpec, MlpSpec, PreNorm, RmsNormSpec
from jdsi.runtime.mesh_executor import MeshExecutor
from jdsi.runtime.offload import footprint_on
from jdsi.runtime.residency import plan_residency
from jdsi.runtime.resident import ResidentExecutor
from jdsi.runtime.streamed import StreamedExecutor
from jdsi.sharding import make_mesh

HEADS, KV_HEADS, DIM, HIDDEN = 4, 2, 8, 40
NORM = RmsNormSpec(1e-6)
LAYER = LayerSpec((AttentionSpec(HEADS, KV_HEADS, DIM, DIM**-0.5), MlpSpec(HIDDEN, "relu", gated=True)), PreNorm(NORM))


def small_spec(layer: LayerSpec = LAYER, **head: Any) -> TransformerSpec:
    """Two layers of a kind, without positions."""
    return TransformerSpec("toy", 37, 24, 64, EmbeddingSpec(), (layer, layer), NORM, HeadSpec(tied=False, **head))


def random_arrays(spec: TransformerSpec) -> dict[str, jax.Array]:
    """Parameters large enough that everything shows in the logits."""
    arrays = parameters(Transformer(spec, rngs=nnx.Rngs(3)))
    floats = {name: jax.numpy.issubdtype(array.dtype, np.floating) for name, array in arrays.items()}
    return {name: 10 * array if floats[name] and array.ndim > 1 else array for name, array in arrays.items()}


class PlainModel:
    """The same model in NumPy and float64, one sequence at a time; a toy overrides what it changes."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self.arrays = {name: np.asarray(array).astype(np.float64) for name, array in arrays.items()}

    def matrix(self, name: str) -> np.ndarray:
        """A weight `[out, in]`."""
        return self.arrays[name]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        """RMSNorm."""
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + NORM.eps) * self.arrays[f"{name}.weight"]

    def attention(self, at: str, x: np.ndarray) -> np.ndarray:
        """Causal, with grouped heads."""
        qkv = (x @ self.matrix(f"{at}.attention.qkv.weight").T).reshape(len(x), -1, DIM).transpose(1, 0, 2)
        q, k, v = qkv[:HEADS], *(np.repeat(part, HEADS // KV_HEADS, 0) for part in np.split(qkv[HEADS:], 2))
        scores = np.where(np.tri(len(x), dtype=bool), q @ k.transpose(0, 2, 1) * DIM**-0.5, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = weights / weights.sum(-1, keepdims=True) @ v
        return out.transpose(1, 0, 2).reshape(len(x), -1) @ self.matrix(f"{at}.attention.out.weight").T

    def feed_forward(self, at: str, x: np.ndarray) -> np.ndarray:
        """Gated."""
        gate, up = np.split(x @ self.matrix(f"{at}.feed_forward.up.weight").T, 2, axis=1)
        return (np.maximum(gate, 0) * up) @ self.matrix(f"{at}.feed_forward.down.weight").T

    def layer(self, at: str, x: np.ndarray) -> np.ndarray:
        """Pre-norm."""
        x = x + self.attention(at, self.norm(f"{at}.attention_norm", x))
        return x + self.feed_forward(at, self.norm(f"{at}.feed_forward_norm", x))

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Of every token."""
        x = self.arrays["embedding.tokens.weight"][tokens]
        for index in range(2):
            x = self.layer(f"layers.{index}", x)
        return self.norm("norm", x) @ self.matrix("head.weight").T

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """What follows a prompt."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


def executors(spec: TransformerSpec, arrays: Mapping[str, jax.Array], folder: Path) -> Iterator[tuple[str, Any]]:
    """Every way to run the model, each closed when the next one is asked for."""
    yield "resident", ResidentExecutor(Transformer.from_parameters(spec, arrays))

    def load(part: jax.sharding.Mesh, names: Any) -> dict[str, jax.Array]:
        return from_arrays(arrays, spec, part, names, dtype="float32")

    # Nothing divides by three: shares are padded, and tokens divided only where there are as many.
    mesh, stages = make_mesh(tensor=3, pipe=2), [range(1), range(1, 2)]
    yield "mesh", MeshExecutor(spec, mesh, load, dtype="float32", stages=stages, sequence_parallel=True)
    store = _stored(spec, arrays, folder)
    for mesh in (make_mesh(devices=jax.local_devices()[:1]), make_mesh(tensor=2, data=2)):
        residency = plan_residency(footprint_on(store, np.dtype("float32")), None)
        with contextlib.closing(StreamedExecutor(store, residency, dtype="float32", mesh=mesh)) as streamed:
            yield f"streamed to {mesh.size}", streamed


def _stored(spec: TransformerSpec, arrays: Mapping[str, jax.Array], folder: Path) -> BlockStore:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
    write_streaming(MemoryParameters(arrays), spec, folder, dtype=None, watch=lambda *_: None)
    checkpoint: Any = StreamingCheckpoint(folder)
    return BlockStore.open(StoredModel(checkpoint, None, None, spec, checkpoint, folder))  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class Toy:
    """Something added from outside: a spec that has it, and the model in NumPy."""

    spec: TransformerSpec
    plain: type[PlainModel]
