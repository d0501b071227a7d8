"""Streaming weights: how close to the disk's limit, how much memory, what sharing a pass among batches brings."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdsi.converters import convert, random_checkpoint
from jdsi.converters.block_store import Block, BlockStore
from jdsi.converters.direct_io import DirectReader, PageBuffer, Segment
from jdsi.errors import ConfigError
from jdsi.runtime import Step, capacity_bucket
from jdsi.runtime.decoding import new_context
from jdsi.runtime.offload import PROCESS_BYTES, kv_bytes
from jdsi.runtime.residency import Residency, plan_residency
from jdsi.runtime.streamed import StreamedExecutor

from .processes import ask
from .report import Report, ratio_text, spread, warn, warn_if_busy
from .rounds import Ratio, interleave, seconds
from .shapes import scratch, shape_config, sized_config

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# While others have their turn the ring is filled; of so many blocks that is a small part of a pass.
_LAYERS = 64
_SPAN = 64 << 20
_PEAK_TOKENS = 64
_NOTES = (
    "One pass decodes one token for every row of every batch, and reads every streamed block once. Up to 3 of its"
    " blocks are read before its turn.",
    "All contenders took turns in the same rounds; a ratio is the median of the rounds' ratios (smallest to largest).",
    "disk: the same bytes read with O_DIRECT, 64 MiB at a time, and nothing else. folder: streamed from the safetensors"
    " files as they are. mmap: each block copied out of a mapping of its own when the one before is done with, its"
    " cache dropped first.",
    "peak memory: over that of the same work on a model of 0.3 MB; goal: the memory limit given, which is ring,"
    " resident parts, KV cache and 400 MiB.",
    "bytes/pass: what the process read from storage (/proc/self/io), over the bytes of the streamed weights.",
)


def bench_offload(
    *,
    gigabytes: float = 3.0,
    dtype: str = "bfloat16",
    compute_dtype: str = "float32",
    batch: int = 1,
    batches_per_pass: Sequence[int] = (1, 2, 4, 8),
    rounds: int = 3,
    folder: str | os.PathLike[str] | None = None,
) -> Report:
    """Seconds of a decoding pass over a random checkpoint whose layers all stay on disk.

    Args:
        gigabytes: smallest size of the checkpoint, in 10^9 bytes.
        dtype: that it is stored in.
        compute_dtype: that the model runs in.
        batch: rows of a batch.
        batches_per_pass: how many batches share a pass, one measurement each.
        rounds: of measuring.
        folder: where the checkpoint is made twice and deleted; the temporary folder by default.

    Raises:
        ConfigError: a number is out of range or a dtype unknown.
    """
    if rounds < 1 or gigabytes <= 0 or batch < 1 or not batches_per_pass or min(batches_per_pass) < 1:
        raise ConfigError(f"{rounds=}, {gigabytes=}, {batch=} and {batches_per_pass=} must be positive")
    if dtype not in _ITEM_BYTES or compute_dtype not in _ITEM_BYTES:
        raise ConfigError(f"{dtype=} and {compute_dtype=} must be among {', '.join(_ITEM_BYTES)}")
    warn_if_busy()
    with scratch(folder) as place:
        warn(f"offload: writing {gigabytes:g} GB of random weights twice in {place}")
        config = sized_config(gigabytes, _ITEM_BYTES[dtype], least_layers=_LAYERS)
        source = random_checkpoint(place / "source", config, dtype=dtype)
        convert(source, place / "store", to="streaming")
        results = _measure(source, place / "store", compute_dtype, batch, tuple(batches_per_pass), rounds)
        warn("offload: peak memory in a process of its own")
        tiny = random_checkpoint(place / "tiny", shape_config("llama-tiny"), dtype=dtype)
        results.append(_peak(place / "store", tiny, compute_dtype))
    settings = {
        "gigabytes": gigabytes,
        "dtype": dtype,
        "compute_dtype": compute_dtype,
        "batch": batch,
        "batches_per_pass": list(batches_per_pass),
        "rounds": rounds,
    }
    return Report("offload", settings, results, _table(results), _NOTES)


def _measure(
    source: Path, store: Path, dtype: str, batch: int, together: tuple[int, ...], rounds: int
) -> list[dict[str, Any]]:
    runs: dict[str, Callable[[], Any]] = {}
    with contextlib.ExitStack() as stack:
        blocks = BlockStore.open(store)
        residency = plan_residency(blocks, None, np.dtype(dtype))
        streamed = sum(blocks.blocks[name].bytes_stored for name in residency.streamed)
        runs["disk"] = stack.enter_context(_disk(blocks, residency))
        executor = StreamedExecutor(blocks, residency, dtype=dtype)
        stack.callback(executor.close)
        for count in together:
            runs[f"streamed x{count}"] = _Pass(executor, batch, count)
        folder = BlockStore.open(source)
        direct = StreamedExecutor(folder, plan_residency(folder, None, np.dtype(dtype)), dtype=dtype)
        stack.callback(direct.close)
        runs["folder"] = _Pass(direct, batch, 1)
        alone = dataclasses.replace(residency, slots=1)  # one buffer: a block is read when the last one is done with
        mapped = StreamedExecutor(blocks, alone, dtype=dtype, source=_MappedSource())
        stack.callback(mapped.close)
        runs["mmap"] = _Pass(mapped, batch, 1)
        read: dict[str, int] = dict.fromkeys(runs, 0)

        def timed(name: str) -> float:
            before = _storage_bytes()
            taken = seconds(runs[name])
            read[name] += _storage_bytes() - before
            return taken

        figures = interleave({name: partial(timed, name) for name in runs}, rounds)
    results = []
    for name, taken in figures.items():
        rows = batch * int(name.partition(" x")[2] or 1)
        results.append(
            {
                "what": name,
                "seconds": spread(taken),
                "gigabytes_per_second": streamed / spread(taken)["median"] / 1e9,
                "tokens_per_second": None if name == "disk" else rows / spread(taken)["median"],
                "over_disk": Ratio.of(figures["disk"], taken),
                "over_mmap": Ratio.of(figures["mmap"], taken),
                "bytes_per_pass": read[name] / (rounds + 1) / streamed,  # the warm-up included
            }
        )
    return results


def _storage_bytes() -> int:
    """Bytes that this process has had fetched from storage."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


@contextlib.contextmanager
def _disk(store: BlockStore, residency: Residency) -> Iterator[Callable[[], None]]:
    reader = DirectReader()
    memory = PageBuffer(_SPAN).bytes
    spans = [
        Segment(file, start, min(_SPAN, stop - start), 0)
        for file, first, stop in _ranges([s for name in residency.streamed for s in store.blocks[name].segments])
        for start in range(first, stop, _SPAN)
    ]

    def run() -> None:
        for span in spans:
            reader.read([span], memory)

    yield run
    reader.close()


def _ranges(segments: Sequence[Segment]) -> list[tuple[Path, int, int]]:
    """File, first byte and end of runs of segments that lie one behind another."""
    found: list[tuple[Path, int, int]] = []
    for s in segments:
        if found and found[-1][0] == s.file and found[-1][2] == s.offset:
            found[-1] = (s.file, found[-1][1], s.offset + s.nbytes)
        else:
            found.append((s.file, s.offset, s.offset + s.nbytes))
    return found


def _argmax(logits: jax.Array, carry: Any) -> tuple[jax.Array, Any]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), carry


class _Pass:
    """One decoding pass for `count` batches of `rows` rows that hold 16 tokens each."""

    def __init__(self, executor: StreamedExecutor, rows: int, count: int) -> None:
        self._executor = executor
        tokens = jnp.arange(rows * 16, dtype=jnp.int32)
        last = jnp.arange(rows, dtype=jnp.int32) * 16 + 15
        context = [
            new_context(executor, rows, 16, 1024).extend(jnp.full(rows, 16, jnp.int32), 16) for _ in range(count)
        ]
        done = executor.steps([Step(tokens, one, last, _argmax, ()) for one in context])
        self._state = [(new, one.extend(jnp.ones(rows, jnp.int32), 1)) for new, one, _ in done]

    def __call__(self) -> None:
        done = self._executor.steps([Step(tokens, context, None, _argmax, ()) for tokens, context in self._state])
        self._state = [(new, context) for new, context, _ in done]
        jax.block_until_ready([new for new, _ in self._state])


class _MappedSource:
    """Blocks copied out of a memory-mapped file whose cache is dropped first: the simplest way to run from disk."""

    needs_memory = True

    def read(self, block: Block, memory: np.ndarray) -> dict[str, np.ndarray]:
        for segment in block.segments:
            descriptor = os.open(segment.file, os.O_RDONLY)
            # Pages that are mapped stay, so the mapping is made anew.
            os.posix_fadvise(descriptor, segment.offset, segment.nbytes, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
            mapped = np.memmap(segment.file, np.uint8, "r", segment.offset, segment.nbytes)
            memory[segment.target : segment.target + segment.nbytes] = mapped
            del mapped
        return block.arrays(memory)

    def close(self) -> None:
        """Nothing stays open."""


def _peak(store: Path, tiny: Path, dtype: str) -> dict[str, Any]:
    """Peak memory over that of the same work on a model of 0.3 MB, which is what importing and starting up take."""
    blocks = BlockStore.open(store)
    planned = plan_residency(blocks, None, np.dtype(dtype)).nbytes
    kv = kv_bytes(blocks.spec, capacity_bucket(_PEAK_TOKENS), np.dtype(dtype))
    baseline = ask("offload", folder=tiny, dtype=dtype, tokens=_PEAK_TOKENS, limit=2 * PROCESS_BYTES)["peak"]
    limit = PROCESS_BYTES + planned + kv
    peak = ask("offload", folder=store, dtype=dtype, tokens=_PEAK_TOKENS, limit=limit)["peak"]
    goal = limit
    return {
        "what": "peak memory",
        "weights": blocks.nbytes,
        "planned": planned,
        "peak": peak,
        "baseline": baseline,
        "peak_over_baseline": peak - baseline,
        "goal": goal,
        "within": peak - baseline <= goal,
    }


def _table(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["what", "a pass", "GB/s", "tokens/s", "over disk", "over mmap", "bytes/pass"]]
    for result in results[:-1]:
        tokens, read = result["tokens_per_second"], result["bytes_per_pass"]
        rows.append(
            [
                result["what"],
                f"{result['seconds']['median']:.2f} s",
                f"{result['gigabytes_per_second']:.2f}",
                "" if tokens is None else f"{tokens:.2f}",
                ratio_text(result["over_disk"]),
                ratio_text(result["over_mmap"]),
                "" if read is None else f"{read:.2f}",
            ]
        )
    peak = results[-1]
    rows.append(
        [
            f"peak memory, model of {peak['weights'] / 1e9:.2f} GB",
            f"{peak['peak_over_baseline'] / 1e6:.0f} MB",
            *[""] * 3,
            f"goal {peak['goal'] / 1e6:.0f} MB",
            "yes" if peak["within"] else "NO",
        ]
    )
    return rows
