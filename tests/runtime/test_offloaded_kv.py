"""Keys and values that live elsewhere are the same as if they had never left the device."""

import dis
import errno
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jdsi.errors import CapacityError, ConfigError, JdsiError
from jdsi.runtime.kv_offload import moves
from jdsi.runtime.kv_offload.memory import OffloadedKV
from jdsi.runtime.kv_offload.slabs import FileSlabs, HostSlabs
from jdsi.runtime.kv_offload.store import SlabStore
from jdsi.sharding import make_mesh, stage_meshes

HEADS = [(2, 8, 8), (4, 8, 24), (2, 8, 8)]
CAPACITY = 256


@pytest.fixture(params=["host", "nvme"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SlabStore]:
    opened = SlabStore(HostSlabs() if request.param == "host" else FileSlabs(tmp_path))
    yield opened
    opened.close()


def mesh_of(**axes: int) -> Any:
    (mesh,) = stage_meshes(make_mesh(**axes))
    return mesh


def made(store: SlabStore, rows: int = 2, **options: Any) -> OffloadedKV:
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
    expand, aliases = moves._expand, []

    def slow_expand(mesh: Any, capacity: int) -> Any:
        program = slowly(expand(mesh, capacity))

        def run(arrays: Any, lengths: Any) -> Any:
            aliases.extend(shard.data.unsafe_buffer_pointer() for x in arrays for shard in x.addressable_shards)
            return program(arrays, lengths)

        return run

    model = Reference(OffloadedKV(HEADS, 2, CAPACITY, jnp.float32, mesh_of(), store), jnp.float32, 0)
    model.step(np.array([100, 90]), 128)
    monkeypatch.setattr(moves, "_expand", slow_expand)
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


def pass_through(kv: OffloadedKV, layer: int, lengths: int = 0, new: int = 100) -> None:
    kv.give(layer, kv.take(layer), [lengths] * kv.rows, [new] * kv.rows, new)


def failing(error: int) -> Any:
    def fail(*_: Any) -> int:
        raise OSError(error, os.strerror(error))

    return fail


@pytest.mark.parametrize(
    ("call", "error", "kind", "message"),
    [
        ("preadv", errno.EIO, JdsiError, r"reading at byte \d+: Input/output error"),
        ("pwritev", errno.EIO, JdsiError, r"writing at byte \d+: Input/output error"),
        ("pwritev", errno.ENOSPC, CapacityError, r"writing at byte \d+: No space left"),
    ],
)
def test_a_failing_disk_is_heard_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int, kind: type, message: str
) -> None:
    home = FileSlabs(tmp_path)
    store = SlabStore(home)
    kv, other = made(store), made(store)
    for one in (kv, other):
        pass_through(one, 0)
        store.saves.submit(lambda: None).result()
    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing(error))
        if call == "preadv":
            kv.prefetch(0)
        else:
            pass_through(kv, 1)
        with pytest.raises(kind, match=message) as caught:
            kv.take(0 if call == "preadv" else 1)
        assert type(caught.value) is kind
    for act in (lambda: kv.prefetch(2), lambda: kv.take(2), lambda: kv.select([0, 1]), lambda: pass_through(kv, 2)):
        with pytest.raises(kind, match=message):
            act()
    pass_through(other, 0, lengths=100, new=1)  # a batch does not suffer from another's failure
    kv.close()
    other.close()
    assert not home._loaded
    assert home.file._free == [(0, home.file.size)]
    assert not store.ahead
    store.close()


def test_whatever_fails_is_heard_of(store: SlabStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the device is lost")

    kv = made(store)
    with monkeypatch.context() as patched:
        patched.setattr(moves, "_insert", fail)
        pass_through(kv, 0)
        store.saves.submit(lambda: None).result()
    for _ in range(2):
        with pytest.raises(JdsiError, match="moving keys and values failed: the device is lost"):
            kv.take(0)
    kv.close()


def test_a_closed_memory_says_so(store: SlabStore) -> None:
    kv = made(store)
    pass_through(kv, 0)
    memory = kv.take(1)
    kv.prefetch(2)
    kv.close()
    kv.close()
    for act in (
        lambda: kv.prefetch(0),
        lambda: kv.take(0),
        lambda: kv.give(1, memory, [0, 0], [1, 1], 1),
        lambda: kv.select([0, 1]),
    ):
        with pytest.raises(JdsiError, match="keys and values are closed"):
            act()
    late = made(store)
    store.close()
    store.close()
    for act in (lambda: late.prefetch(0), lambda: late.take(0)):
        with pytest.raises(JdsiError, match="closed"):
            act()
    late.close()


def delayed(call: Any, begun: threading.Event, seconds: float = 0.3) -> Any:
    def run(*arguments: Any) -> Any:
        begun.set()
        time.sleep(seconds)
        return call(*arguments)

    return run


@pytest.mark.parametrize("what", ["memory", "store", "dropped"])
def test_closing_waits_for_what_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    home = FileSlabs(tmp_path)
    store, begun = SlabStore(home), threading.Event()
    kv = made(store)
    for layer in (0, 1):
        pass_through(kv, layer)
    store.saves.submit(lambda: None).result()
    monkeypatch.setattr(os, "preadv", delayed(os.preadv, begun))
    kv.prefetch(0)
    kv.prefetch(1)
    assert begun.wait(10)
    if what == "store":
        store.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(home.file._descriptor)
        with pytest.raises(JdsiError, match="closed"):
            kv.take(2)
        return
    if what == "memory":
        kv.close()
    else:
        alive = weakref.ref(kv)
        del kv
        gc.collect()
        assert alive() is None, "what is under way keeps the memory"
        store.loads.submit(lambda: None).result()
    assert not home._loaded
    assert home.file._free == [(0, home.file.size)]
    assert not store.ahead
    store.close()


def test_memory_that_is_dropped_is_used_again(store: SlabStore) -> None:
    sizes = []
    for _ in range(3):
        kv = made(store)
        pass_through(kv, 0)
        kv.take(1)
        sizes.append(
            sorted(
                str(slab.place if isinstance(store.home, FileSlabs) else slab.place.ctypes.data)
                for state in kv._layers
                for pair in state.slabs.values()
                for slab in pair
            )
        )
        del kv
        gc.collect()
        store.loads.submit(lambda: None).result()
    assert sizes[0] == sizes[1] == sizes[2]


def test_only_so_much_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, begun = SlabStore(FileSlabs(tmp_path), ahead=1, behind=1), threading.Event()
    kv = made(store)
    kv.prefetch(0)
    kv.prefetch(1)
    assert [state.loading is not None for state in kv._layers] == [True, False, False]
    monkeypatch.setattr(os, "pwritev", delayed(os.pwritev, begun))
    pass_through(kv, 0)
    kv.prefetch(1)
    assert kv._layers[1].loading is not None
    before = store.report()
    pass_through(kv, 1)
    assert kv._layers[0].saving.done(), "the second layer did not wait for the first to be saved"
    assert store.report().wait_seconds - before.wait_seconds > 0.1
    kv.close()
    store.close()


def test_room_of_what_was_dropped_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, begun = FileSlabs(tmp_path), threading.Event()
    store = SlabStore(home)
    kv = made(store)
    size, grow = home.file.size, home.file._grow

    def full(wanted: int) -> None:
        if wanted > size:
            raise CapacityError(f"there is room for one batch of {size} bytes")
        grow(wanted)

    monkeypatch.setattr(home.file, "_grow", full)
    monkeypatch.setattr(os, "pwritev", delayed(os.pwritev, begun))
    pass_through(kv, 0)
    assert begun.wait(10)
    kv.close()
    again = made(store)
    pass_through(again, 0)
    del again
    again = made(store)  # while the last one's first layer is being saved
    with pytest.raises(CapacityError, match="room for one batch"):
        made(store)
    shapes = [(128, 1, 1, 8)]
    with pytest.raises(CapacityError, match="room for one batch"):  # the thread that frees cannot wait for itself
        store.loads.submit(lambda: store.allocate(shapes, np.dtype(np.float32))).result(10)
    again.close()
    store.close()
    with pytest.raises(JdsiError, match=f"the spill file in {tmp_path} is closed"):
        made(store)


@cache
def interruptible(code: Any) -> set[int]:
    """Where in a function Python looks for Ctrl-C: at its beginning, behind calls and before it jumps back."""
    instructions = list(dis.get_instructions(code))
    behind = {
        next_one.offset
        for one, next_one in pairwise(instructions)
        if one.opname == "RESUME" or one.opname.startswith("CALL")
    }
    return behind | {one.offset for one in instructions if one.opname.startswith("JUMP_BACKWARD")}


def interrupted(place: int, call: Any) -> bool:
    """Whether Ctrl-C stopped `call`, at the `place`-th place it came to in this package where that can be."""
    left, package = place, str(Path(moves.__file__).parent)

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(package):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and frame.f_lasti in interruptible(frame.f_code):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python looks at the frame that begins to trace
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_anywhere_loses_nothing(tmp_path: Path) -> None:
    home = FileSlabs(tmp_path)
    store = SlabStore(home, ahead=1, behind=1)

    def use(kv: OffloadedKV) -> None:
        for layer in range(len(HEADS)):
            pass_through(kv, layer)
            kv.prefetch((layer + 1) % len(HEADS))

    kv = made(store)
    use(kv)
    kv.close()
    stopped, place = True, 0
    while stopped:
        kv, place = made(store), place + 1
        stopped = interrupted(place, lambda kv=kv: use(kv))
        kv.close()
        assert not store.ahead, place
        assert not home._loaded, place
        assert home.file._free == [(0, home.file.size)], place
        waiter = threading.Thread(target=store.wait_for_room_behind, daemon=True)
        waiter.start()
        waiter.join(10)
        assert not waiter.is_alive(), f"{place}: the next layer would wait for good"
    assert place > 100
    store.close()


def test_what_an_interrupt_left_unnoted_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, begun = FileSlabs(tmp_path), threading.Event()
    store = SlabStore(home)
    kv = made(store)
    state = kv._layers[0]
    kv.prefetch(0)
    state.loading = None
    monkeypatch.setattr(os, "pwritev", delayed(os.pwritev, begun))
    pass_through(kv, 0)
    saving, state.saving = state.saving, None
    assert begun.wait(10)
    kv.close()
    assert saving.done(), "its room is free while it is written"
    saving.result()
    assert not home._loaded
    store.close()


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
