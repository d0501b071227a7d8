"""What `processes.ask` runs: one job, named in the argument with its settings, answered with one line of JSON.

A script of its own, not a module of the package: importing jdsi is part of what is measured, so the jobs do it.
"""

import contextlib
import itertools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


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


def offload(folder: str, dtype: str, tokens: int, limit: int) -> dict[str, Any]:
    """Generates two tokens with weights that stay on disk."""
    import jdsi

    engine = jdsi.init_inference(
        folder,
        dtype=dtype,
        offload="nvme",
        memory_limit=limit,
        max_batch_size=1,
        max_tokens=tokens,
        compilation_cache=False,
    )
    engine.generate([1, 2, 3], jdsi.SamplingParams(max_new_tokens=2, ignore_eos=True))
    engine.close()
    return {"peak": peak_bytes()}


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
