"""Keys and values that live elsewhere when something fails, is closed, dropped or full."""

import errno
import gc
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdsi.errors import CapacityError, JdsiError
from jdsi.runtime.kv_offload import moves
from jdsi.runtime.kv_offload.slabs import FileSlabs, HostSlabs
from jdsi.runtime.kv_offload.store import SlabStore
from offloaded import Reference, delayed, failing, made, open_store, pass_through

store = pytest.fixture(params=["host", "nvme"])(open_store)


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
    with pytest.raises(CapacityError, match="room for one batch"):
        again.select([0, 1, 1, 0])
    again.close()
    store.close()
    with pytest.raises(JdsiError, match="this store of keys and values is closed"):
        made(store)


@pytest.mark.parametrize(
    ("call", "error", "kind", "before", "rows"),
    [
        ("preadv", errno.EIO, JdsiError, 0, [1, 0]),
        ("preadv", errno.EIO, JdsiError, 3, [1, 0, 0, 1]),
        ("pwritev", errno.EIO, JdsiError, 3, [1, 0]),
        ("pwritev", errno.ENOSPC, CapacityError, 0, [1, 0, 0, 1]),
        ("posix_fallocate", errno.ENOSPC, CapacityError, 1, [1, 0, 0, 1]),
    ],
)
def test_selecting_on_a_failing_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int, kind: type, before: int, rows: list[int]
) -> None:
    """The disk fails at the first layer, or behind calls for others, whose rows are in their new places already."""
    home = FileSlabs(tmp_path)
    store, whole, calls = SlabStore(home), getattr(os, call), []
    models = [Reference(made(store), jnp.float32, seed) for seed in range(2)]
    for model in models:
        model.step(np.array([100, 90]), 128)
    store.saves.submit(lambda: None).result()

    def fail_later(*arguments: Any) -> Any:
        calls.append(arguments)
        return (whole if len(calls) <= before else failing(error))(*arguments)

    kv, other = models[0].kv, models[1]
    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail_later)
        for act in (lambda: kv.select(np.array(rows)), lambda: kv.take(0)):
            with pytest.raises(kind) as caught:
                act()
            assert type(caught.value) is kind
    other.check()
    other.select(rows)
    other.check()
    kv.close()
    other.kv.close()
    assert not home._loaded
    assert home.file._free == [(0, home.file.size)]
    store.close()


def test_a_layer_that_fails_while_it_computes(store: SlabStore) -> None:
    """Its batch hears of it, then or later; the other of the same store goes on, and all room is used again."""

    def fail(x: np.ndarray) -> np.ndarray:
        raise RuntimeError("the layer failed")

    @jax.jit
    def failing_layer(memory: Any) -> Any:
        return [jax.pure_callback(fail, jax.ShapeDtypeStruct(x.shape, x.dtype), x) for x in memory]

    models = [Reference(made(store), jnp.float32, seed) for seed in range(2)]
    for model in models:
        model.step(np.array([100, 90]), 128)
    kv, other = models[0].kv, models[1]
    kv.prefetch(1)

    def use() -> None:
        kv.give(0, failing_layer(kv.take(0)), [100, 90], [1, 1], 1)
        kv.take(0)

    heard = "the layer failed|layer 0 was taken and not given back"
    for _ in range(2):
        with pytest.raises((RuntimeError, JdsiError, ValueError), match=heard):
            use()
        other.check()
    kv.close()
    other.step(np.array([1, 1]), 1)
    other.select([1, 0])
    other.check()
    other.kv.close()
    assert not store.ahead
    if isinstance(store.home, FileSlabs):
        assert not store.home._loaded
        assert store.home.file._free == [(0, store.home.file.size)]


@pytest.mark.parametrize("thread", ["loads", "saves"])
def test_a_store_may_be_dropped_in_its_own_threads(tmp_path: Path, thread: str) -> None:
    """Garbage is collected wherever there is much of it; there nobody can wait for what stands behind."""
    home = FileSlabs(tmp_path)
    store, dropped = SlabStore(home), threading.Event()
    loads, saves = store.loads, store.saves

    def collect() -> None:
        dropped.wait(10)
        gc.collect()

    done = getattr(store, thread).submit(collect)
    loads.submit(lambda: saves.submit(lambda: None).result())
    cycle = {"store": store}
    cycle["itself"] = cycle
    gc.disable()
    try:
        del store, cycle
        dropped.set()
        done.result(10)
    finally:
        gc.enable()
    for worker in (loads, saves):
        worker._thread.join(10)
        assert not worker._thread.is_alive()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(home.file._descriptor)


def test_what_is_dropped_behind_its_store_is_gone() -> None:
    store = SlabStore(HostSlabs())
    kv = made(store)
    memory = weakref.ref(next(iter(kv._layers[0].slabs.values()))[0].place)
    store.close()
    assert memory() is not None
    del kv
    gc.collect()
    assert memory() is None, "what nobody will run any more keeps the slabs"
    store.close()
