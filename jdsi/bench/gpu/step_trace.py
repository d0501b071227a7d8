"""What a profiler's trace of the device says: how long it worked, on what, and how long it stood idle in between."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

_SHOWN = 12  # kernels that are named
_LONGEST = 5  # gaps that are named

Event = tuple[str, float, float]  # name, start and end in nanoseconds


def trace_facts(run: Callable[[], object], folder: Path, steps: int) -> dict[str, Any]:
    """Runs something under JAX's profiler and says what the GPU did, by step.

    Args:
        run: does so many steps.
        folder: where the trace goes.
        steps: how many.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # a line of Python for every call would be most of the trace
    jax.profiler.start_trace(str(folder), profiler_options=options)
    try:
        run()
    finally:
        jax.profiler.stop_trace()
    files = sorted(folder.rglob("*.xplane.pb"))
    if not files:
        return {"trace": "the profiler wrote none"}
    return event_facts(device_events(jax.profiler.ProfileData.from_file(str(files[-1]))), steps)


def device_events(data: Any) -> list[Event]:
    """What ran on the streams of all GPUs in a trace."""
    found: list[Event] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of how JAX's own types are made
        for plane in data.planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            lines = list(plane.lines)
            streams = [line for line in lines if line.name.startswith("Stream")]
            for line in streams or lines:
                found += [(event.name, event.start_ns, event.start_ns + event.duration_ns) for event in line.events]
    return sorted(found, key=lambda event: event[1])


def event_facts(events: Sequence[Event], steps: int) -> dict[str, Any]:
    """Times of a step in microseconds; the first step is left to start up, and counts like the others."""
    if not events:
        return {"trace": "nothing ran on a GPU"}
    copies = [event for event in events if "memcpy" in event[0].lower() or "memset" in event[0].lower()]
    gaps = list(_gaps(events))
    whole = max(end for _, _, end in events) - events[0][1]
    idle = sum(gap for gap, _ in gaps)

    def each(nanoseconds: float) -> float:
        return round(nanoseconds / 1e3 / steps, 2)

    spent: defaultdict[str, float] = defaultdict(float)
    times: Counter[str] = Counter()
    for name, begin, end in events:
        spent[name] += end - begin
        times[name] += 1
    facts: dict[str, Any] = {
        "us from first to last": each(whole),
        "us at work": each(whole - idle),
        "us idle in between": each(idle),
        "launches": round(len(events) / steps, 1),
        "copies and fills": round(len(copies) / steps, 1),
        "us of copies and fills": each(sum(end - begin for _, begin, end in copies)),
    }
    for name, nanoseconds in sorted(spent.items(), key=lambda item: -item[1])[:_SHOWN]:
        facts[f"us of {name[:80]} (x{times[name] / steps:.1f})"] = each(nanoseconds)
    for gap, behind in sorted(gaps, reverse=True)[:_LONGEST]:
        facts[f"us idle behind {behind[:80]}"] = round(gap / 1e3, 2)
    return facts


def _gaps(events: Iterable[Event]) -> Iterable[tuple[float, str]]:
    """Stretches in which nothing runs, in nanoseconds, each with what ran before."""
    last, until = "", None
    for name, begin, end in events:
        if until is not None and begin > until:
            yield begin - until, last
        if until is None or end > until:
            last, until = name, end
