"""Streaming weights: how close to the disk's limit, beside what else runs such models, and how much memory it takes."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdsi.converters import convert, random_checkpoint
from jdsi.converters.block_store import BlockStore
from jdsi.converters.quantization import Quantization
from jdsi.errors import ConfigError
from jdsi.kv_cache import Contiguous
from jdsi.runtime import Executor
from jdsi.runtime.memory import available_memory
from jdsi.runtime.offload import footprint_on
from jdsi.runtime.residency import plan_residency
from jdsi.runtime.streamed import StreamedExecutor

from .offload_contenders import PROMPT, Contender, Decoding, Disk, MappedSource, Turn
from .offload_memory import loaded_bytes, peak_memory
from .offload_peers import OFFLOAD_PEERS, check_installed, open_offload_peers
from .offload_tables import NOTES, curve_table, passes_table
from .peers import check_peers
from .report import Report, spread, warn, warn_if_busy
from .rounds import Ratio, interleave
from .shapes import ITEM_BYTES, check_dtypes, scratch, shape_config, sized_config

# What is read ahead must be a small part of a pass, and a block a small part of the model.
_LAYERS = 64


def bench_offload(
    *,
    gigabytes: float = 3.0,
    dtype: str = "bfloat16",
    compute_dtype: str = "float32",
    batch: int = 1,
    batches_per_pass: Sequence[int] = (1, 2, 4, 8, 16),
    quantize: Sequence[str] = (),
    rounds: int = 3,
    peers: Sequence[str] = (),
    folder: str | os.PathLike[str] | None = None,
) -> Report:
    """Seconds of a decoding pass over a random checkpoint whose layers all stay on disk.

    Args:
        gigabytes: smallest size of the checkpoint, in 10^9 bytes.
        dtype: that it is stored in.
        compute_dtype: that the model runs in.
        batch: rows of a batch.
        batches_per_pass: how many batches share a pass, one measurement each.
        quantize: `"int8"`, `"int4"`: streamed quantised as well, one measurement each.
        rounds: of measuring.
        peers: `"disk-offload"`, `"cpu-offload"`, both of accelerate.
        folder: where the checkpoint is made twice, once more for `"disk-offload"`, smaller for each of `quantize`, and
            deleted; the temporary folder by default.

    Raises:
        ConfigError: a number is out of range, a dtype or a peer unknown, or a peer not installed.
    """
    if rounds < 1 or gigabytes <= 0 or batch < 1 or not batches_per_pass or min(batches_per_pass) < 1:
        raise ConfigError(f"{rounds=}, {gigabytes=}, {batch=} and {batches_per_pass=} must be positive")
    check_dtypes(dtype, compute_dtype)
    forms = [Quantization(kind) for kind in dict.fromkeys(quantize)]
    check_peers(peers, OFFLOAD_PEERS)
    check_installed(peers)
    warn_if_busy()
    with scratch(folder) as place:
        warn(f"offload: writing {gigabytes:g} GB of random weights twice in {place}")
        config = sized_config(gigabytes, ITEM_BYTES[dtype], least_layers=_LAYERS)
        source = random_checkpoint(place / "source", config, dtype=dtype)
        convert(source, place / "store", to="streaming")
        rounded = {form.kind: BlockStore.open(_quantized(source, place, form)) for form in forms}
        counts = tuple(dict.fromkeys(batches_per_pass))
        measured = _measure(source, place, compute_dtype, batch, counts, rounded, rounds, peers)
        warn("offload: peak memory in a process of its own")
        tiny = random_checkpoint(place / "tiny", shape_config("llama-tiny"), dtype=dtype)
        peak = peak_memory(place / "store", tiny, compute_dtype)
    settings = {
        "gigabytes": gigabytes,
        "dtype": dtype,
        "compute_dtype": compute_dtype,
        "batch": batch,
        "batches_per_pass": list(batches_per_pass),
        "quantize": list(rounded),
        "rounds": rounds,
        "peers": list(peers),
    }
    more = [("tokens/s over batches that share a pass", curve_table(measured))]
    return Report("offload", settings, [*measured, peak], passes_table([*measured, peak]), NOTES, more=more)


def _quantized(source: Path, place: Path, form: Quantization) -> Path:
    convert(source, place / form.kind, to="streaming", quantize=form.kind)
    return place / form.kind


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A contender.

    Attributes:
        contender: itself.
        rows: that a pass of it decodes.
        nbytes: of the weights that a pass streams.
        rounded: whether they are quantised, so that its tokens may be others.
    """

    contender: Contender
    rows: int
    nbytes: int
    rounded: bool = False


def _measure(
    source: Path,
    place: Path,
    dtype: str,
    batch: int,
    counts: tuple[int, ...],
    rounded: Mapping[str, BlockStore],
    rounds: int,
    peers: Sequence[str],
) -> list[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        blocks = BlockStore.open(place / "store")
        residency = plan_residency(footprint_on(blocks, np.dtype(dtype)), None)
        nbytes = sum(blocks.blocks[name].bytes_stored for name in residency.streamed)

        def decoding(executor: Executor, count: int = 1) -> _Entry:
            stack.callback(executor.close)
            return _Entry(Decoding(executor, batch, count, rounds + 1), batch * count, nbytes)

        disk = Disk(blocks, residency)
        stack.callback(disk.close)
        entries = {"disk": _Entry(disk, 0, nbytes)}
        executor = StreamedExecutor(blocks, residency, dtype=dtype)
        entries |= {f"streamed x{count}": decoding(executor, count) for count in counts}
        files = BlockStore.open(source)
        planned = plan_residency(footprint_on(files, np.dtype(dtype)), None)
        entries["folder"] = decoding(StreamedExecutor(files, planned, dtype=dtype))
        for kind, store in rounded.items():
            planned = plan_residency(footprint_on(store, np.dtype(dtype)), None)
            own = sum(store.blocks[name].bytes_stored for name in planned.streamed)
            entry = decoding(StreamedExecutor(store, planned, dtype=dtype))
            entries[f"streamed {kind}"] = dataclasses.replace(entry, nbytes=own, rounded=True)
        alone = dataclasses.replace(residency, slots=1)  # one buffer: a block is read when the last one is done with
        entries["mmap"] = decoding(StreamedExecutor(blocks, alone, dtype=dtype, source=MappedSource()))
        loaded = loaded_bytes(blocks, dtype)
        batches = batch * (sum(counts) + 3 + len(rounded))
        others = batches * Contiguous().bytes(blocks.spec.kv_shapes, 1, PROMPT, dtype)
        others += blocks.nbytes * ("cpu-offload" in peers)
        if loaded + others < 0.7 * available_memory():
            # What offload="auto" chooses where it fits. The same programs, so that only the streaming differs.
            everything = plan_residency(footprint_on(blocks, np.dtype(dtype)), None, stream=False)
            entries["in memory"] = decoding(StreamedExecutor(blocks, everything, dtype=dtype))
        else:
            warn(f"offload: {loaded / 1e9:.1f} GB of weights do not fit memory, which leaves out the compute limit")
        opened = stack.enter_context(open_offload_peers(peers, source, place, dtype, batch))
        entries |= {name: _Entry(peer, batch, nbytes) for name, peer in opened.items()}
        turns = interleave({name: entry.contender.turn for name, entry in entries.items()}, rounds)
    results = [_result(name, entries[name], turns) for name in entries]
    reference: Any = entries[f"streamed x{counts[0]}"].contender
    for result in results:
        if result["what"] != "disk" and not entries[result["what"]].rounded:
            result |= compare_tokens(result["what"], entries[result["what"]].contender, reference)
        if result["what"].startswith("streamed x"):
            result["limits"] = limits(turns, result["what"], batch)
    return results


def _result(name: str, entry: _Entry, turns: Mapping[str, list[Turn]]) -> dict[str, Any]:
    taken = [turn.seconds for turn in turns[name]]
    return {
        "what": name,
        "seconds": spread(taken),
        "gigabytes_per_second": spread([turn.bytes_read / turn.seconds / 1e9 for turn in turns[name]]),
        "tokens_per_second": spread([entry.rows / t for t in taken]) if entry.rows else None,
        "over_disk": Ratio.of([turn.seconds for turn in turns["disk"]], taken),
        "over_mmap": Ratio.of([turn.seconds for turn in turns["mmap"]], taken),
        "streamed_bytes": entry.nbytes,
        "bytes_per_pass": spread([turn.bytes_read / entry.nbytes for turn in turns[name]]),
    }


def limits(turns: Mapping[str, list[Turn]], name: str, batch: int) -> dict[str, Any] | None:
    """What a pass of several batches could reach at most, and what it did; `None` where that was not measured.

    Reading for the next layer goes on while one computes, so a pass takes at least as long as the longer of the two:
    reading its bytes, and one pass in memory for each batch.

    Args:
        turns: of all contenders.
        name: of this one, "streamed x4" for four batches.
        batch: rows of a batch.
    """
    if "in memory" not in turns:
        return None
    count = int(name.partition(" x")[2])
    reading = [turn.seconds for turn in turns["disk"]]
    computing = [count * turn.seconds for turn in turns["in memory"]]
    longer = [max(pair) for pair in zip(reading, computing, strict=True)]
    return {
        "disk_tokens_per_second": spread([batch * count / t for t in reading]),
        "compute_tokens_per_second": spread([batch * count / t for t in computing]),
        "binds": ["disk" if r >= c else "compute" for r, c in zip(reading, computing, strict=True)],
        "share": Ratio.of(longer, [turn.seconds for turn in turns[name]]),
    }


def compare_tokens(name: str, one: Any, reference: Any) -> dict[str, Any]:
    """Compares the tokens of two contenders, and says where a row of one leaves the other's.

    Args:
        name: for the message.
        one, reference: have `tokens` and `margins`, see `Decoding`.
    """
    steps = min(len(one.tokens), len(reference.tokens))
    same = np.stack(one.tokens[:steps]) == np.stack(reference.tokens[:steps])  # [steps, rows]
    margins = [float(reference.margins[np.argmin(row)][i]) for i, row in enumerate(same.T) if not row.all()]
    if margins:
        warn(
            f"warning: {name} gives other tokens in {len(margins)} of {same.shape[1]} rows; where they part, the best "
            f"logit was ahead of the next by {', '.join(f'{margin:.1e}' for margin in margins)}"
        )
    return {"equal_tokens": int(same.sum()), "compared_tokens": same.size, "margins_where_they_part": margins}
