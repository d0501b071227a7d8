"""Keys and values that live elsewhere, for tests: small ones, arrays to compare them with, and ways to disturb them."""

import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdsi.runtime.kv_offload.memory import OffloadedKV
from jdsi.runtime.kv_offload.slabs import FileSlabs, HostSlabs
from jdsi.runtime.kv_offload.store import SlabStore
from jdsi.sharding import make_mesh, stage_meshes

HEADS = [(2, 8, 8), (4, 8, 24), (2, 8, 8)]
CAPACITY = 256


def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SlabStore]:
    """A fixture's: a store of the kind that its parameter names, closed behind the test."""
    opened = SlabStore(HostSlabs() if request.param == "host" else FileSlabs(tmp_path))
    yield opened
    opened.close()


def mesh_of(**axes: int) -> Any:
    """A mesh of these axes."""
    (mesh,) = stage_meshes(make_mesh(**axes))
    return mesh


def made(store: SlabStore, rows: int = 2, **options: Any) -> OffloadedKV:
    """Of `HEADS`, on one device."""
    return OffloadedKV(HEADS, rows, CAPACITY, jnp.float32, mesh_of(), store, **options)


@partial(jax.jit, donate_argnums=0)
def add_tokens(memory: Any, slots: jax.Array, new: Any) -> Any:
    """What a layer's program does: new tokens go to `slots[b, s]` of each row, those past the capacity nowhere."""
    rows = jnp.arange(slots.shape[0])[:, None]
    return tuple(x.at[rows, :, slots].set(n, mode="drop") for x, n in zip(memory, new, strict=True))


class Reference:
    """Plain arrays beside an `OffloadedKV`, with a model whose layers write random tokens."""

    def __init__(self, kv: OffloadedKV, dtype: Any, seed: int) -> None:
        self.kv, self.dtype, self.rng = kv, np.dtype(dtype), np.random.default_rng(seed)
        self.lengths, self.program = np.zeros(kv.rows, np.int64), add_tokens
        self.layers = [[np.zeros((kv.rows, heads, CAPACITY, dim), dtype) for dim in dims] for heads, *dims in HEADS]

    def step(self, new_lengths: np.ndarray, new_tokens: int) -> None:
        for layer in range(len(HEADS)):
            if self.rng.random() < 0.8:
                self.kv.prefetch((layer + self.rng.integers(0, 2)) % len(HEADS))
            self.layer(layer, new_lengths, new_tokens)
        self.lengths += new_lengths

    def layer(self, layer: int, new_lengths: np.ndarray, new_tokens: int) -> None:
        memory = self.kv.take(layer)
        for array, expected in zip(memory, self.layers[layer], strict=True):
            np.testing.assert_array_equal(np.asarray(array).view(np.uint8), expected.view(np.uint8))
        self.add(layer, memory, new_lengths, new_tokens)

    def add(self, layer: int, memory: Any, new_lengths: np.ndarray, new_tokens: int) -> None:
        slots = self.lengths[:, None] + np.arange(new_tokens)
        slots = np.where(np.arange(new_tokens) < new_lengths[:, None], slots, CAPACITY)
        shape = (self.kv.rows, new_tokens)
        new = [
            self.rng.standard_normal((*shape, x.shape[1], x.shape[3])).astype(self.dtype) for x in self.layers[layer]
        ]
        for x, n in zip(self.layers[layer], new, strict=True):
            for row in range(self.kv.rows):
                at = slots[row, : new_lengths[row]]
                x[row][:, at] = n[row, : new_lengths[row]].swapaxes(0, 1)
        self.kv.give(layer, self.program(memory, slots, new), self.lengths, new_lengths, new_tokens)

    def check(self) -> None:
        self.step(np.zeros(self.kv.rows, np.int64), 1)

    def select(self, rows: list[int]) -> None:
        self.kv.select(np.array(rows))
        self.lengths = self.lengths[rows]
        self.layers = [[x[rows] for x in layer] for layer in self.layers]


def pass_through(kv: OffloadedKV, layer: int, lengths: int = 0, new: int = 100) -> None:
    """Has `new` tokens, zeros, come to all rows of a layer."""
    kv.give(layer, kv.take(layer), [lengths] * kv.rows, [new] * kv.rows, new)


def failing(error: int) -> Any:
    """A call to the system that fails."""

    def fail(*_: Any) -> int:
        raise OSError(error, os.strerror(error))

    return fail


def delayed(call: Any, begun: threading.Event, seconds: float = 0.3) -> Any:
    """A call to the system that takes long."""

    def run(*arguments: Any) -> Any:
        begun.set()
        time.sleep(seconds)
        return call(*arguments)

    return run
