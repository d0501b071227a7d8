"""Keys and values that live elsewhere are the same as if they had never left the device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jdsi.errors import CapacityError, ConfigError
from jdsi.runtime.kv_offload import programs
from jdsi.runtime.kv_offload.memory import OffloadedKV
from jdsi.runtime.kv_offload.store import SlabStore
from offloaded import CAPACITY, HEADS, Reference, add_tokens, made, mesh_of, open_store, pass_through

store = pytest.fixture(params=["host", "nvme"])(open_store)


@pytest.mark.parametrize(
    ("axes", "link", "dtype"),
    [
        ({}, 1, jnp.float32),
        ({}, 1, jnp.bfloat16),
        ({"tensor": 2}, 1, jnp.bfloat16),
        ({"tensor": 2}, 2, jnp.float32),
        ({"data": 2, "tensor": 2}, 2, jnp.bfloat16),
    ],
)
def test_the_same_as_plain_arrays(store: SlabStore, axes: dict[str, int], link: int, dtype: Any) -> None:
    kv = OffloadedKV(HEADS, 4, CAPACITY, dtype, mesh_of(**axes), store, devices_per_link=link)
    for layer in range(len(HEADS)):
        devices = jax.devices()[: len(kv.offloaded(0)) * link]
        assert kv.offloaded(layer) == [d for i, d in enumerate(devices) if i % link == layer % link]
    model = Reference(kv, dtype, seed=link)
    model.step(np.array([7, 128, 1, 60]), 128)
    for i in range(5):
        model.step(np.array([1, 1, i % 2, 1]), 1)
    model.select([1, 0, 3, 3])
    model.step(np.array([1, 0, 1, 1]), 1)
    model.select([1, 1, 0, 0, 2, 2, 3, 3])
    model.step(np.ones(8, np.int64), 1)
    model.step(CAPACITY - model.lengths, CAPACITY)
    model.check()
    report = store.report()
    assert report.bytes_read > 0
    assert report.bytes_written > 0


def test_batches_share_a_store(store: SlabStore) -> None:
    batches = [
        Reference(OffloadedKV(HEADS, rows, CAPACITY, jnp.float32, mesh_of(), store), jnp.float32, rows)
        for rows in (1, 3)
    ]
    for new_tokens in (64, 1, 1):
        for layer in range(len(HEADS)):
            for batch, following in zip(batches, [*batches[1:], batches[0]], strict=True):
                new = np.minimum(batch.rng.integers(0, 65, batch.kv.rows), new_tokens)
                batch.new = new if layer == 0 else batch.new
                following.kv.prefetch(layer if following is not batches[0] else (layer + 1) % len(HEADS))
                batch.layer(layer, batch.new, new_tokens)
        for batch in batches:
            batch.lengths += batch.new
    for batch in batches:
        batch.check()


def slowly(program: Any) -> Any:
    """`program`, which reads its arrays a while after it was called. (One with a callback would be waited for.)"""

    def run(memory: Any, *rest: Any) -> Any:
        busy = lax.fori_loop(0, 15_000, lambda _, x: jnp.sin(x @ x), jnp.ones((64, 64), jnp.float32))
        zero = jnp.where(busy[0, 0] > 2, 1, 0)  # a sine never is
        return program([x + zero.astype(x.dtype) for x in memory], *rest)

    return jax.jit(run)


def test_memory_waits_for_who_reads_it(store: SlabStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU a program reads the slab, or what was loaded of it, in place: neither may change meanwhile."""
    expand, aliases = programs._expand, []

    def slow_expand(mesh: Any, capacity: int) -> Any:
        program = slowly(expand(mesh, capacity))

        def run(arrays: Any, lengths: Any) -> Any:
            aliases.extend(shard.data.unsafe_buffer_pointer() for x in arrays for shard in x.addressable_shards)
            return program(arrays, lengths)

        return run

    model = Reference(OffloadedKV(HEADS, 2, CAPACITY, jnp.float32, mesh_of(), store), jnp.float32, 0)
    model.step(np.array([100, 90]), 128)
    monkeypatch.setattr(programs, "_expand", slow_expand)
    taken = [model.kv.take(layer) for layer in range(len(HEADS))]
    assert not taken[-1][0].is_ready()
    loaded = {memory.ctypes.data for state in model.kv._layers for memory in next(iter(state.taken.memories.values()))}
    assert loaded == set(aliases), "JAX copies what is put on the device, so that this test shows nothing"
    shapes = [slab.shape for state in model.kv._layers for pair in state.slabs.values() for slab in pair]
    model.kv.close()
    memories = store.home.load(store.home.allocate(shapes, np.dtype(np.float32)), 0)
    assert {memory.ctypes.data for memory in memories} == loaded
    for memory in memories:
        memory[:] = 77
    for memory, expected in zip(taken, model.layers, strict=True):
        for array, values in zip(memory, expected, strict=True):
            np.testing.assert_array_equal(array, values)


def test_slow_layers_are_waited_for(store: SlabStore) -> None:
    batches = [Reference(made(store), jnp.float32, seed) for seed in range(2)]
    for batch in batches:
        batch.step(np.array([100, 90]), 128)
        batch.program = slowly(add_tokens)
    for _ in range(2):
        for batch in batches:
            for layer in range(len(HEADS)):
                memory = batch.kv.take(layer)  # without looking at it, which would wait
                batch.kv.prefetch((layer + 1) % len(HEADS))
                batch.add(layer, memory, np.array([1, 1]), 1)
            assert not batch.kv._layers[-1].saving.done()
            batch.lengths += 1
    for batch in batches:
        batch.program = add_tokens
        batch.check()


def test_what_is_taken_may_be_donated(store: SlabStore) -> None:
    kv = OffloadedKV(HEADS, 1, CAPACITY, jnp.float32, mesh_of(), store)
    kv.give(0, tuple(x + 1 for x in kv.take(0)), [0], [130], 130)
    memory = kv.take(0)
    host = next(iter(kv._layers[0].taken.memories.values()))
    pointers = [x.unsafe_buffer_pointer() for x in memory]
    assert not set(pointers) & {x.ctypes.data for x in host}
    double = jax.jit(lambda memory: [x * 2 for x in memory], donate_argnums=0)
    changed = jax.block_until_ready(double(memory))
    assert all(x.is_deleted() for x in memory)
    assert [x.unsafe_buffer_pointer() for x in changed] == pointers, "the layer was copied"
    assert all((x[:130] == 1).all() for x in host)
    kv.give(0, changed, [130], [0], 1)


def test_loading_is_counted_and_happens_ahead(store: SlabStore) -> None:
    kv, slot = made(store), 2 * 2 * 8 * 4  # rows, heads, dim, bytes
    pass_through(kv, 0, new=96)
    store.saves.submit(lambda: None).result()
    before = store.report()
    assert before.bytes_written == 2 * 96 * slot
    assert before.bytes_read == 0
    kv.prefetch(0)
    store.loads.submit(lambda: None).result()
    assert store.report().bytes_read == 2 * 96 * slot
    pass_through(kv, 0, lengths=96, new=1)
    assert store.report().bytes_read - before.bytes_read == 2 * 96 * slot


def test_tokens_can_be_taken_back(store: SlabStore) -> None:
    kv = made(store)
    kv.give(0, tuple(x + 1 for x in kv.take(0)), [0, 0], [10, 10], 10)
    kv.give(0, tuple(x + 1 for x in kv.take(0)), [4, 10], [2, 0], 2)
    keys, _ = kv.take(0)
    expected = np.zeros(keys.shape, np.float32)
    expected[0, :, :4], expected[0, :, 4:6], expected[1, :, :10] = 1, 2, 1
    np.testing.assert_array_equal(keys, expected)


def test_wrong_use_is_refused(store: SlabStore) -> None:
    two = mesh_of(data=2)
    for arguments, options, message in (
        ((HEADS, 3, 256, jnp.float32, two, store), {}, "3 rows cannot be divided over 2 devices on the axis 'data'"),
        (([(3, 8, 8)], 2, 256, jnp.float32, mesh_of(tensor=2), store), {}, "3 kv heads cannot be divided over 2"),
        ((HEADS, 2, 200, jnp.float32, two, store), {}, "capacity=200 must be a multiple of 128"),
        ((HEADS, 2, 256, jnp.float32, two, store), {"devices_per_link": 0}, "devices_per_link=0 must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            OffloadedKV(*arguments, **options)
    kv = OffloadedKV(HEADS, 4, CAPACITY, jnp.float32, two, store)
    with pytest.raises(ValueError, match="layer 0 was not taken"):
        kv.give(0, (jnp.zeros(1), jnp.zeros(1)), [0] * 4, [1] * 4, 1)
    memory = kv.take(0)
    with pytest.raises(ValueError, match="layer 0 was taken and not given back"):
        kv.take(0)
    with pytest.raises(ValueError, match="while a layer is taken"):
        kv.select([0, 1, 2, 3])
    for lengths, new, tokens, kind, message in (
        ([0] * 3, [1] * 3, 1, ValueError, "of 4 rows"),
        ([1] * 4, [1] * 4, 1, ValueError, "cannot continue behind"),
        ([0] * 4, [2] * 4, 1, ValueError, "of 1 new tokens"),
        ([0] * 4, [257] * 4, 257, CapacityError, "would have 257 tokens, and its KV memory has 256 slots"),
    ):
        with pytest.raises(kind, match=message):
            kv.give(0, memory, lengths, new, tokens)
    everywhere = jax.device_put(memory, NamedSharding(two, PartitionSpec()))
    with pytest.raises(ValueError, match="must be divided as"):
        kv.give(0, everywhere, [0] * 4, [1] * 4, 1)
    with pytest.raises(ValueError, match="is float32"):
        kv.give(0, tuple(x[:, :1] for x in memory), [0] * 4, [1] * 4, 1)
    kv.give(0, memory, [0] * 4, [1] * 4, 1)
    with pytest.raises(ValueError, match="in their own group of the axis 'data'"):
        kv.select([2, 1, 2, 3])
    kv.select([1, 0, 3, 3])
