"""A choice of degrees in words: a table of candidates, and why one was taken and others not."""

import dataclasses
from collections.abc import Iterator, Sequence

from .candidate import TIE, Candidate, Request, gib
from .shares import parameter_count

_HEADINGS = (
    *("tensor", "pipeline", "data", "devices", "batch", "ms/token", "tokens/s"),
    *("first token", "GiB/device", "communication", "bubble"),
)


@dataclasses.dataclass(frozen=True)
class _Time:
    """What the time of a token is made of, in seconds: reading and computing, exchanges, and waiting."""

    work: float
    communication: float
    waiting: float

    @classmethod
    def of_token(cls, one: Candidate) -> "_Time":
        """On its way through the stages."""
        assert one.decode is not None
        step = one.decode
        communication = step.communication * step.latency
        return cls(step.latency - communication, communication, step.seconds - step.latency)

    @classmethod
    def of_devices(cls, one: Candidate) -> "_Time":
        """Of all devices together, for one token of one sequence."""
        assert one.decode is not None
        step, per_stage = one.decode, one.parallelism.tensor * one.parallelism.data / one.batch
        work = step.micro_batches * per_stage * sum(stage.operations + stage.launches for stage in step.stages)
        communication = step.micro_batches * per_stage * sum(stage.collectives for stage in step.stages)
        return cls(work, communication, step.seconds * one.parallelism.devices / one.batch - work - communication)


def explain(request: Request, ranked: Sequence[Candidate], rejected: Sequence[Candidate], rows: int) -> str:
    """See `jdsi.planning.Choice`, whose attributes these are, and its `explain`."""
    more = len(ranked) - rows
    lines = [_title(request), *_table(ranked[:rows])]
    lines += [f"(and {more} more that fit)"] if more > 0 else []
    lines += [_winner(request, ranked[0])]
    # The runner-up, and those that one would have thought of first.
    told = [ranked[0]]
    for one in [*ranked[1:2], *_obvious(request, [*ranked, *rejected])]:
        if one not in told:
            told.append(one)
            lines += [f"- {one.parallelism}: {one.rejected or _why(request, ranked[0], one)}"]
    return "\n".join(lines)


def _title(request: Request) -> str:
    batch = "as many sequences as fit" if request.batch is None else f"batch {request.batch}"
    return (
        f"{request.spec.family}, {parameter_count(request.spec) / 1e9:.4g} billion parameters, for {request.goal} on"
        f" {request.topology}: {batch}, context {request.context}, prompt {request.prompt},"
        f" {gib(request.limit)} a device"
    )


def _table(candidates: Sequence[Candidate]) -> Iterator[str]:
    lines = [_HEADINGS, *(tuple(_cells(one)) for one in candidates)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))


def _cells(one: Candidate) -> Iterator[str]:
    assert one.decode is not None
    assert one.prefill is not None
    assert one.memory is not None
    degrees = one.parallelism
    yield from map(str, (degrees.tensor, degrees.pipeline, degrees.data, degrees.devices, one.batch))
    yield f"{one.decode.seconds * 1e3:.2f}"
    yield f"{one.decode.tokens_per_second:.0f}"
    yield f"{one.prefill.seconds:.3g} s"
    yield f"{one.memory.total / 2**30:.1f}"
    yield f"{one.decode.communication:.0%}"
    yield f"{one.decode.bubble:.0%}"


def _winner(request: Request, best: Candidate) -> str:
    assert best.decode is not None
    degrees, time = best.parallelism, _Time.of_token(best)
    if request.goal == "throughput":
        return (
            f"Chosen: {degrees}, for no other gives noticeably more than its {best.decode.tokens_per_second:.0f} tokens"
            f" a second, with {best.batch} sequences that each wait {_ms(best.decode.seconds)} for one."
        )
    if degrees.devices == 1:
        return f"Chosen: one device, {_ms(best.decode.seconds)} a token, for more do not make it faster."
    if degrees.tensor == 1:
        return f"Chosen: {degrees}, {_ms(best.decode.seconds)} a token, for sharing layers costs more than it saves."
    return (
        f"Chosen: {degrees}, whose tokens come fastest, {_ms(best.decode.seconds)} each: {degrees.tensor} devices share"
        f" every layer, which takes {_ms(time.work)} in all, and exchange data for {_ms(time.communication)}."
    )


def _obvious(request: Request, every: Sequence[Candidate]) -> Iterator[Candidate]:
    """All devices on one axis, tensor parallelism inside hosts with either of the others between, and one device."""
    count, host = request.topology.count, request.topology.devices_per_host
    wanted = [
        (count, 1, 1),
        (1, count, 1),
        (1, 1, count),
        (host, count // host, 1),
        (host, 1, count // host),
        (1, 1, 1),
    ]
    known = {dataclasses.astuple(one.parallelism): one for one in every}
    return (known[degrees] for degrees in wanted if degrees in known)


def _why(request: Request, best: Candidate, loser: Candidate) -> str:
    assert best.decode is not None
    assert loser.decode is not None
    if request.goal == "throughput":
        ratio = loser.decode.tokens_per_second / best.decode.tokens_per_second
        rate = f"{loser.decode.tokens_per_second:.0f} tokens a second, {ratio:.2f} times as many"
        if ratio > 1 / TIE:
            return f"{rate}, the same as far as the model can tell, and {_ms(loser.decode.seconds)} for a token"
        if loser.batch < 0.9 * best.batch:
            return f"{rate}: beside its weights there is memory for {loser.batch} sequences, not {best.batch}"
        more, less = _Time.of_devices(loser), _Time.of_devices(best)
        reason = _more(more, less, "its devices read and compute for longer")
        return f"{rate}: {reason} for each token"
    ratio = loser.decode.seconds / best.decode.seconds
    time = f"{_ms(loser.decode.seconds)} a token, {ratio:.2f} times as long"
    if ratio < TIE:
        return f"{_ms(loser.decode.seconds)} a token, the same as far as the model can tell"
    fewer = f"a layer takes longer on {loser.parallelism.tensor} of them than on {best.parallelism.tensor}"
    alike = loser.parallelism.tensor >= best.parallelism.tensor
    work = "there is more to read and compute on the way" if alike else fewer
    return f"{time}: {_more(_Time.of_token(loser), _Time.of_token(best), work)}"


def _more(loser: _Time, best: _Time, work: str) -> str:
    """What the loser spends its additional time on."""
    reasons = {
        "work": work,
        "communication": "its devices exchange data for longer",
        "waiting": "more time is spent waiting for other stages",
    }
    worst = max(reasons, key=lambda name: getattr(loser, name) - getattr(best, name))
    more, less = (f"{round(getattr(time, worst) * 1e3, 6) + 0.0:.3g}" for time in (loser, best))
    return f"{reasons[worst]}, {more} against {less} ms"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
