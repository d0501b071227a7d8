"""Jobs that need a process of their own: `python -m jdsi.bench.worker '{"job": "load", ...}'` answers with JSON.

The imports stand inside the jobs, because when they happen is part of what is measured.
"""

import contextlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jdsi.errors import JdsiError


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


def ask(job: str, **settings: Any) -> dict[str, Any]:
    """Runs a job in a fresh process and returns its answer.

    Raises:
        JdsiError: the process failed; the message holds its last words.
    """
    command = [sys.executable, "-m", "jdsi.bench.worker", json.dumps({"job": job, **settings}, default=str)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise JdsiError(f"the process measuring {job!r} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def baseline() -> dict[str, Any]:
    """Everything that the other jobs import, and a started backend, but no weights."""
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint.experimental.v1  # noqa: F401
    import tensorstore  # noqa: F401
    import transformers

    import jdsi.converters

    _ = transformers.AutoConfig, transformers.LlamaConfig, jdsi.converters
    jax.block_until_ready(jnp.zeros(1) + 1)
    return {"peak": peak_bytes()}


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


def convert(source: str, destination: str, to: str, max_shard_size: int) -> dict[str, Any]:
    """Converts a checkpoint."""
    from jdsi.converters import convert as run

    assert to in ("orbax", "hf")
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
    jax.block_until_ready([array for array in jax.live_arrays() if not array.is_deleted()])
    marks.append(time.perf_counter())
    tokens = []
    events = engine.stream([prompt], jdsi.SamplingParams(max_new_tokens=2, ignore_eos=True))
    for event in events:
        tokens.append(event.token_id)
        marks.append(time.perf_counter())
    hits, misses = compilation_counts()
    stages = ("import", "load", "first_token", "second_token")
    return {
        "seconds": {name: b - a for name, a, b in zip(stages, marks, marks[1:], strict=True)},
        "tokens": tokens,
        "hits": hits,
        "misses": misses,
    }


_JOBS = {job.__name__: job for job in (baseline, load, convert, start)}


def main() -> None:
    """Runs the job named in the argument."""
    settings = json.loads(sys.argv[1])
    try:
        answer = _JOBS[settings.pop("job")](**settings)
    except JdsiError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
