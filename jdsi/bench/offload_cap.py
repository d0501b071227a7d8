"""That a model runs where it does not fit: processes whose memory may grow by no more than a part of its size."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jdsi.converters import random_checkpoint
from jdsi.converters.block_store import BlockStore
from jdsi.errors import ConfigError, JdsiError
from jdsi.runtime.memory import available_host_memory
from jdsi.runtime.offload import PROCESS_BYTES

from .offload_memory import TOKENS, loaded_bytes, streaming_limit
from .processes import ask
from .report import Report, warn
from .shapes import ITEM_BYTES, check_dtypes, scratch, shape_config, sized_config

_LAYERS = 32  # so that three of them are a small part
_NOTES = (
    "Each line is a process of its own on the CPU. It does the same with a model of 0.3 MB first; from there on its"
    " address space (RLIMIT_AS) may grow by the cap and no further, which no page cache and no mapping escapes.",
    "limit: the memory_limit that the engine is given. streamed: blocks that are read for every pass.",
)


def bench_offload_cap(
    *,
    gigabytes: float = 10.0,
    dtype: str = "bfloat16",
    compute_dtype: str = "float32",
    share: float = 0.2,
    folder: str | os.PathLike[str] | None = None,
) -> Report:
    """Generates with a random checkpoint under a cap of memory, in memory and streamed, and without the cap.

    Args:
        gigabytes: smallest size of the checkpoint, in 10^9 bytes.
        dtype: that it is stored in.
        compute_dtype: that the model runs in.
        share: of the checkpoint's size that memory may grow by.
        folder: where the checkpoint is made and deleted; the temporary folder by default.

    Raises:
        ConfigError: a number is out of range, a dtype unknown, or the cap too small to stream under it.
    """
    if gigabytes <= 0 or not 0 < share < 1:
        raise ConfigError(f"{gigabytes=} must be positive and {share=} between 0 and 1")
    check_dtypes(dtype, compute_dtype)
    with scratch(folder) as place:
        warn(f"offload: writing {gigabytes:g} GB of random weights in {place}")
        config = sized_config(gigabytes, ITEM_BYTES[dtype], least_layers=_LAYERS)
        source = random_checkpoint(place / "source", config, dtype=dtype)
        tiny = random_checkpoint(place / "tiny", shape_config("llama-tiny"), dtype=dtype)
        results = _measure(source, tiny, compute_dtype, share)
    settings = {"gigabytes": gigabytes, "dtype": dtype, "compute_dtype": compute_dtype, "share": share}
    return Report("offload-cap", settings, results, _table(results), _NOTES)


def _measure(source: Path, tiny: Path, dtype: str, share: float) -> list[dict[str, Any]]:
    store = BlockStore.open(source)
    cap, limit = int(share * store.nbytes), streaming_limit(store, dtype)
    if limit - PROCESS_BYTES > cap:
        raise ConfigError(
            f"a cap of {cap:,} bytes, {share:g} of the checkpoint, is too small: streaming it takes "
            f"{limit - PROCESS_BYTES:,} bytes; a larger checkpoint needs less in proportion"
        )

    run = partial(run_offload, source, tiny, dtype)
    results = [run("in memory, capped", cap, None), run("streamed, capped", cap, limit)]
    loaded, available = loaded_bytes(store, dtype), available_host_memory()
    # Other blocks stay, so others are streamed than under the cap.
    results.append(run("streamed, no cap", None, limit + min(loaded, available) // 3))
    if loaded < 0.7 * available:
        results.append(run("in memory, no cap", None, None))
    capped, *references = results[1:]
    verdict = {
        "what": "verdict",
        "weights": store.nbytes,
        "loading_fails": "failed" in results[0],
        "streaming_runs": "failed" not in capped,
        "same_tokens": all("tokens" in one and one["tokens"] == capped.get("tokens") for one in references),
    }
    return [*results, verdict]


def run_offload(folder: Path, tiny: Path, dtype: str, what: str, cap: int | None, limit: int | None) -> dict[str, Any]:
    """Generates in a process of its own: `tokens` and the like, or how it `failed`.

    Args:
        folder: the model.
        tiny: a small one, with which the same is done before the cap holds.
        dtype: that both run in.
        what: a name for it.
        cap: bytes by which its memory may grow.
        limit: the memory limit it streams with; `None` for a model in memory.
    """
    warn(f"offload: {what}")
    try:
        answer = ask("offload", folder=folder, dtype=dtype, tokens=TOKENS, limit=limit, warm_up=tiny, cap=cap)
    except JdsiError as error:  # ended by a signal, for not everything in a process can report that memory is short
        answer = {"failed": _gist(str(error))}
    return {"what": what, "cap": cap, "limit": limit, **answer}


def _gist(message: str) -> str:
    """The first line of a message and its last one."""
    lines = [line for line in message.splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"


def _table(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [["what", "cap", "limit", "streamed", "time", "peak memory", "tokens"]]
    for result in results[:-1]:
        row = [result["what"], _megabytes(result["cap"]), _megabytes(result["limit"])]
        if "failed" in result:
            rows.append([*row, "", "", "", f"failed: {result['failed'][:200]}"])
            continue
        streamed = "" if result["streamed"] is None else str(result["streamed"])
        tokens = " ".join(map(str, result["tokens"]))
        rows.append([*row, streamed, f"{result['seconds']:.1f} s", _megabytes(result["peak"]), tokens])
    verdict = results[-1]
    yes = {True: "yes", False: "NO"}
    rows.append(
        [
            f"{verdict['weights'] / 1e9:.2f} GB: loading fails, streaming runs, tokens are the same",
            *[""] * 5,
            ", ".join(yes[verdict[key]] for key in ("loading_fails", "streaming_runs", "same_tokens")),
        ]
    )
    return rows


def _megabytes(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:.0f} MB"
