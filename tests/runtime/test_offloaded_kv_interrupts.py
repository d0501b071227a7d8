"""Ctrl-C anywhere in what handles keys and values that live elsewhere: nothing is lost, nothing freed in use."""

import dis
import gc
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jdsi.errors import JdsiError
from jdsi.runtime.kv_offload import moves
from jdsi.runtime.kv_offload.memory import OffloadedKV
from jdsi.runtime.kv_offload.slabs import FileSlabs
from jdsi.runtime.kv_offload.store import SlabStore
from offloaded import CAPACITY, HEADS, Reference, delayed, made, mesh_of, pass_through


@cache
def interruptible(code: Any) -> set[int]:
    """Where in a function Python looks for Ctrl-C: at its beginning, behind calls and before it jumps back."""
    instructions = list(dis.get_instructions(code))
    behind = {
        next_one.offset
        for one, next_one in itertools.pairwise(instructions)
        if one.opname == "RESUME" or one.opname.startswith("CALL")
    }
    return behind | {one.offset for one in instructions if one.opname.startswith("JUMP_BACKWARD")}


def interrupted(here: Callable[[Any, int], bool], call: Any) -> bool:
    """Whether Ctrl-C stopped `call`, at the first place it came to in this package where that can be and is to be."""
    package = str(Path(moves.__file__).parent)

    def trace(frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(package):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and frame.f_lasti in interruptible(frame.f_code) and here(frame.f_code, frame.f_lasti):
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


def at(place: int) -> Callable[[Any, int], bool]:
    """The `place`-th."""
    count = itertools.count(1)
    return lambda code, offset: next(count) == place


def new_to(done: set[tuple[Any, int]]) -> Callable[[Any, int], bool]:
    """One that is not in `done` yet, and is then."""

    def here(code: Any, offset: int) -> bool:
        found = (code, offset) not in done
        done.add((code, offset))
        return found

    return here


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
        stopped = interrupted(at(place), lambda kv=kv: use(kv))
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


def test_an_interrupt_anywhere_from_making_to_closing_loses_nothing(tmp_path: Path) -> None:
    home = FileSlabs(tmp_path)
    store = SlabStore(home)

    def live() -> None:
        kv = OffloadedKV(HEADS[:1], 2, CAPACITY, jnp.float32, mesh_of(), store)
        pass_through(kv, 0)
        kv.prefetch(0)
        kv.select([1, 0])
        kv.select([0, 1, 1, 0])
        kv.prefetch(0)
        kv.close()

    live()
    stopped, done = True, set()
    while stopped:
        stopped, place = interrupted(new_to(done), live), len(done)
        store.loads.submit(lambda: None).result()
        assert not store.ahead, place
        assert not home._loaded, place
        assert home.file._free == [(0, home.file.size)], place
    assert len(done) > 100
    store.close()


def test_what_is_used_behind_an_interrupt_is_right_or_says_so(tmp_path: Path) -> None:
    store, heads = SlabStore(FileSlabs(tmp_path)), HEADS[:2]
    mesh = mesh_of(tensor=2)
    lengths, new = np.array([100, 90]), np.array([1, 1])

    def use(model: Reference) -> None:
        for layer in range(len(heads)):
            model.layer(layer, new, 1)
        model.lengths += new
        model.select([1, 0])

    stopped, done, used = True, set(), 0
    while stopped:
        kv = OffloadedKV(heads, 2, CAPACITY, jnp.float32, mesh, store, devices_per_link=2)
        model = Reference(kv, jnp.float32, seed=len(done))
        for layer in range(len(heads)):
            model.layer(layer, lengths, 128)
        model.lengths += lengths
        layers = [[x.copy() for x in layer] for layer in model.layers]
        stopped = interrupted(new_to(done), lambda model=model: use(model))
        for layer in range(len(heads)) if stopped else ():
            try:
                memory = kv.take(layer)
            except (JdsiError, ValueError):
                continue
            used += 1
            for array, expected in zip(memory, layers[layer], strict=True):
                for row, length in enumerate(lengths):
                    np.testing.assert_array_equal(array[row, :, :length], expected[row, :, :length])
        kv.close()
    assert used > 50
    store.close()


@pytest.fixture
def main_thread() -> Iterator[int]:
    """The one that Ctrl-C stops, which workers of pytest ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield threading.get_ident()
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("rows", [[1, 0], [1, 0, 0, 1]], ids=["same", "more"])
@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_an_interrupt_while_rows_are_selected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main_thread: int, call: str, rows: list[int]
) -> None:
    """What the disk is busy with must be neither free nor given to others."""
    home = FileSlabs(tmp_path)
    store, whole, once, busy, violations = SlabStore(home), getattr(os, call), threading.Lock(), [], []
    kv = made(store)
    for layer in range(len(HEADS)):
        pass_through(kv, layer)
    store.saves.submit(lambda: None).result()

    def interrupt_first(descriptor: int, buffers: list[np.ndarray], offset: int) -> int:
        address = buffers[0].ctypes.data
        with once:
            first = not busy
            busy.append(offset)
        if first:
            signal.pthread_kill(main_thread, signal.SIGINT)
            time.sleep(0.3)
        if any(start <= offset < stop for start, stop in home.file._free):
            violations.append(f"the range at {offset} is free")
        if not any(
            memory.ctypes.data <= address < memory.ctypes.data + memory.nbytes for memory in home._loaded.values()
        ):
            violations.append(f"the memory for {offset} was given back")
        return whole(descriptor, buffers, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, interrupt_first)
        with pytest.raises(KeyboardInterrupt):
            kv.select(rows)
        with pytest.raises(JdsiError, match="was interrupted"):
            kv.take(0)
        kv.close()
        time.sleep(0.5)  # for what is still under way
    assert busy
    assert not violations
    assert not home._loaded
    assert home.file._free == [(0, home.file.size)]
    store.close()


def test_an_interrupt_while_room_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main_thread: int) -> None:
    home = FileSlabs(tmp_path)
    store, reserve, interrupts = SlabStore(home), home.file.reserve, []

    def interrupt(sizes: Any) -> Any:
        offsets = reserve(sizes)
        if not interrupts:
            interrupts.append(sizes)
            signal.pthread_kill(main_thread, signal.SIGINT)
            time.sleep(0.1)
        return offsets

    monkeypatch.setattr(home.file, "reserve", interrupt)
    with pytest.raises(KeyboardInterrupt):
        made(store)
    gc.collect()
    store.loads.submit(lambda: None).result()
    assert home.file.size > 0
    assert home.file._free == [(0, home.file.size)]
    store.close()


def test_an_interrupt_while_memory_is_dropped_loses_nothing(tmp_path: Path) -> None:
    """Python runs what a dropped object has to have done wherever it was dropped, in the main thread too."""
    home = FileSlabs(tmp_path)
    store = SlabStore(home)
    for place in range(1, 9):
        held = [made(store)]
        interrupted(at(place), held.clear)
        store.loads.submit(lambda: None).result()
        assert home.file._free == [(0, home.file.size)], place
    store.close()


def is_open(home: FileSlabs) -> bool:
    try:
        os.fstat(home.file._descriptor)
    except OSError:
        return False
    return True


def test_a_store_whose_closing_was_interrupted_can_be_closed(tmp_path: Path) -> None:
    stopped, place = True, 0
    while stopped:
        home = FileSlabs(tmp_path)
        store, place = SlabStore(home), place + 1
        kv = made(store)
        stopped = interrupted(at(place), store.close)
        store.close()
        assert not is_open(home), place
        kv.close()
    assert place > 3


def test_a_store_that_is_not_waited_for_closes_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main_thread: int
) -> None:
    home = FileSlabs(tmp_path)
    store = SlabStore(home)
    kv = made(store)
    pass_through(kv, 0)
    store.saves.submit(lambda: None).result()

    def interrupt(*arguments: Any) -> Any:
        closing.wait(10)
        time.sleep(0.1)
        with once:
            if not interrupts:
                interrupts.append(arguments)
                signal.pthread_kill(main_thread, signal.SIGINT)
        time.sleep(0.3)
        return read(*arguments)

    read, closing, once, interrupts = os.preadv, threading.Event(), threading.Lock(), []
    monkeypatch.setattr(os, "preadv", interrupt)
    kv.prefetch(0)
    closing.set()
    with pytest.raises(KeyboardInterrupt):
        store.close()
    store.loads.join(10)
    assert not is_open(home)
    with pytest.raises(JdsiError, match="closed"):
        made(store)
    store.close()
