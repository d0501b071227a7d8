"""What `processes.ask` runs: one job, named in the argument with its settings, answered with one line of JSON.

A script of its own, not a module of the package: importing jdsi is part of what is measured, so the jobs do it.
"""

import contextlib
import ctypes
import itertools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

NEW_TOKENS = 4


def peak_bytes() -> int:
    """The most memory this process ever had resident.

    From `/proc` where there is one: `getrusage` also remembers the process that started this one.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def load(folder: str, dtype: str) -> dict[str, Any]:
    """Loads a checkpoint and holds it."""
    import jax

    import jdsi
    from jdsi.models import parameters

    start = time.perf_counter()
    arrays = parameters(jdsi.load_model(folder, dtype=dtype))
    jax.block_until_ready(arrays)
    took = time.perf_counter() - start
    return {"peak": peak_bytes(), "bytes": sum(a.nbytes for a in arrays.values()), "seconds": took}


def convert(source: str, destination: str, to: Any, max_shard_size: int) -> dict[str, Any]:
    """Converts a checkpoint."""
    from jdsi.converters import convert as run

    report = run(source, destination, to=to, max_shard_size=max_shard_size)
    return {"peak": peak_bytes(), "bytes": report.bytes, "seconds": report.seconds}


def start(folder: str, cache: str, prompt: list[int]) -> dict[str, Any]:
    """From nothing to a second token, in the stages a user waits for."""
    marks = [time.perf_counter()]
    import jax

    import jdsi
    from jdsi.runtime import compilation_counts

    marks.append(time.perf_counter())
    engine = jdsi.init_inference(folder, compilation_cache=cache)
    jax.block_until_ready(jax.live_arrays())
    marks.append(time.perf_counter())
    tokens = []
    for event in engine.stream([prompt], jdsi.SamplingParams(max_new_tokens=2, ignore_eos=True)):
        tokens.append(event.token_id)
        marks.append(time.perf_counter())
    hits, misses = compilation_counts()
    seconds = [after - before for before, after in itertools.pairwise(marks)]
    stages = ("import", "load", "first_token", "second_token")
    return {
        "seconds": dict(zip(stages, seconds, strict=True)),
        "tokens": tokens,
        "hits": hits,
        "misses": misses,
    }


def offload(
    folder: str, dtype: str, tokens: int, limit: int | None, warm_up: str | None = None, cap: int | None = None
) -> dict[str, Any]:
    """Generates tokens with weights that stay on disk, or without a limit in memory.

    Args:
        folder: the model.
        dtype: that it runs in.
        tokens: that the engine is set up for.
        limit: of memory, for what is kept and read ahead.
        warm_up: a small model with which the same is done first; then all of it on the CPU, whose memory is meant.
        cap: bytes by which the address space may grow from there on, and no further.
    """
    import jax

    import jdsi
    from jdsi.without_torch import import_transformers_without_torch

    if warm_up is not None:
        jax.config.update("jax_platforms", "cpu")

    def generate(model: str) -> tuple[list[int], int | None]:
        offloaded: dict[str, Any] = {} if limit is None else {"offload": "nvme", "memory_limit": limit}
        with contextlib.closing(
            jdsi.init_inference(
                model, dtype=dtype, max_batch_size=1, max_tokens=tokens, compilation_cache=False, **offloaded
            )
        ) as engine:
            sampling = jdsi.SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
            found = engine.generate([5, 9, 2, 7], sampling)[0].token_ids
            residency = getattr(engine.executor, "residency", None)
            return found, None if residency is None else len(residency.streamed)

    if cap is not None:
        import_transformers_without_torch()
        _one_arena()
    if warm_up is not None:
        generate(warm_up)
    before = _address_space()
    if cap is not None:
        resource.setrlimit(resource.RLIMIT_AS, (before + cap, resource.RLIM_INFINITY))
    start = time.perf_counter()
    try:
        made, streamed = generate(folder)
    except Exception as error:  # what a user would see, be it ours, JAX's or Python's
        return {"failed": f"{type(error).__name__}: {error}", "address_space": before}
    took = time.perf_counter() - start
    return {"peak": peak_bytes(), "tokens": made, "streamed": streamed, "seconds": took, "address_space": before}


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _one_arena() -> None:
    """Keeps glibc from reserving 64 MB of address space for every thread that allocates, used or not."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX


def _virtual_devices(count: int) -> None:
    """Makes that many of the CPU; where there are GPUs, JAX uses those instead, however many they are."""
    import jax

    jax.config.update("jax_num_cpu_devices", count)


def mesh_steps(devices: int, **settings: Any) -> dict[str, Any]:
    """Host times and exchanges on meshes."""
    _virtual_devices(devices)
    from jdsi.bench.mesh_steps import measure

    return measure(**settings)


def pipeline(devices: int, load: dict[str, int], **settings: Any) -> dict[str, Any]:
    """Bubbles of a pipeline."""
    _virtual_devices(devices)
    from jdsi.bench.pipeline import Load, measure

    return measure(load=Load(**load), **settings)


def main() -> None:
    """Runs the job named in the argument."""
    settings = json.loads(sys.argv[1])
    jobs = (load, convert, start, offload, mesh_steps, pipeline)
    answer = {job.__name__: job for job in jobs}[settings.pop("job")](**settings)
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
