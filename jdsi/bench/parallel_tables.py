"""The tables of `bench_parallel`, and what to know about them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jdsi.planning.candidate import gib
from jdsi.sharding import Parallelism

from .report import ratio_text

_Records = Sequence[Mapping[str, Any]]
_Table = list[list[str]]

_NOTES = (
    "All contenders took turns in the same rounds; a ratio is the median of the rounds' ratios (smallest to largest).",
    "issue: until the call returns, the devices still at work; of it work: processor time of the calling thread."
    " waited: until the tokens are there; queued: steps one behind another, each. memory: making a batch's KV memory,"
    " once a batch. Virtual devices share the cores here, so that a step on more of them takes longer.",
    "bubble: 1 - (all stages' time alone) / (stages x wall time), from the first call to the last result. A stage's"
    " time alone: its program, 4 runs one behind another with nothing else running, in the same rounds. scheduled:"
    " PipelineSchedule with these times; slowed: the same where stages at work at once slow each other down as much as"
    " measured with nothing to wait for, which is the machine's doing. flush: every token of all micro-batches is"
    " waited for, as training does.",
    "cores: processor time over wall time; fewer than the schedule keeps busy where others use the machine.",
    "exchanges: from the compiled programs, one step of the whole batch, T tokens of a data-parallel group. Copies from"
    " stage to stage are counted, for no program has them.",
)


def _milliseconds(figures: Mapping[str, Any]) -> str:
    return f"{figures['median'] * 1e3:.2f} ms"


def _name(degrees: Mapping[str, int]) -> str:
    named = [f"{axis} {size}" for axis, size in degrees.items() if size > 1]
    return " x ".join(named) or "one device"


def host_table(records: _Records) -> _Table:
    """Of records "host"."""
    rows = [["layers", "on", "issue", "of it work", "over one device", "waited", "queued", "over one device", "memory"]]
    for one in records:
        rows.append(
            [
                str(one["layers"]),
                _name(one["parallelism"]),
                _milliseconds(one["issue"]),
                _milliseconds(one["processor"]),
                ratio_text(one["issue_over_one"]),
                _milliseconds(one["waited"]),
                _milliseconds(one["queued"]),
                ratio_text(one["queued_over_one"]),
                _milliseconds(one["context"]),
            ]
        )
    return rows


def bubble_table(records: _Records) -> _Table:
    """Of records "stage", "at once" and "bubble"."""
    head = ["what", "micro-batches", "wall", "bubble", "scheduled", "slowed", "wall over slowed", "cores"]
    rows = [[*head, "speed over flushing"]]
    for one in records:
        if one["section"] == "stage":
            walls = " and ".join(_milliseconds(seconds) for seconds in one["seconds"])
            rows.append([f"each stage alone, {one['work']}", "", walls, *[""] * 4, _cores(one), ""])
        elif one["section"] == "at once":
            over = f"{ratio_text(one['over_slowest_alone'])} of the slowest"
            rows.append(["all stages at once, generation", "", _milliseconds(one["seconds"]), *[""] * 3, over, "", ""])
        else:
            cut = f" in {one['pieces']} pieces" if one["pieces"] > 1 else ""
            flush = ", flush" if one["flush"] else ""
            bubble = one["bubble"]
            rows.append(
                [
                    f"{one['phase']}{cut}{flush}",
                    str(one["micro_batches"]),
                    _milliseconds(one["seconds"]),
                    f"{bubble['median']:.0%} ({bubble['minimum']:.0%} to {bubble['maximum']:.0%})",
                    f"{one['scheduled_bubble']['median']:.0%}",
                    f"{one['slowed_bubble']['median']:.0%}",
                    ratio_text(one["seconds_over_slowed"]),
                    _cores(one),
                    ratio_text(one["speed_over_flushed"]) if not one["flush"] else "",
                ]
            )
    return rows


def _cores(record: Mapping[str, Any]) -> str:
    return f"{record['cores']['median']:.2f}"


def exchange_table(records: _Records) -> _Table:
    """Of records "exchanges", all stages of a configuration together."""
    rows = [
        ["on", "phase", "T", "axis", "exchange", "number", "each", "formula", "a step", "a token", "planner counts"]
    ]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one in records:
        groups.setdefault((_name(one["parallelism"]), one["phase"]), []).append(one)
    for (name, phase), stages in groups.items():
        tokens = stages[0]["tokens"]
        for axis, kind, sizes, number, total, counted in _by_kind(stages):
            formula = "T x E x 4" if axis != "data" and sizes == {stages[0]["hidden_bytes"]} else ""
            each = " or ".join(f"{size:,}" for size in sorted(sizes))
            rows.append(
                [
                    name,
                    phase,
                    str(tokens),
                    axis,
                    kind,
                    str(number),
                    each,
                    formula,
                    f"{total:,}",
                    f"{total / tokens:,.0f}",
                    counted,
                ]
            )
    return rows


def _by_kind(stages: _Records) -> list[tuple[str, str, set[int], int, int, str]]:
    """Axis, kind, sizes, number and bytes of the exchanges, those of hidden states apart; and what the planner has."""
    found: dict[tuple[str, str, bool], list[Any]] = {}

    def add(one: Mapping[str, Any], hidden_bytes: int, compiled: bool) -> None:
        wide = one["bytes"] == hidden_bytes * one["arrays"]
        entry = found.setdefault((one["axis"] or "several", one["kind"], wide), [set(), 0, 0, 0])
        size = one["bytes"] * one["count"]
        if compiled:
            entry[0].add(one["bytes"] // one["arrays"])
            entry[1] += one["count"] * one["arrays"]
            entry[2] += size
        else:
            entry[3] += size

    for stage in stages:
        for one in stage["collectives"]:
            add(one, stage["hidden_bytes"], True)
        for one in stage["counted"]:
            add(one, stage["hidden_bytes"], False)
    rows = [
        (axis, kind, sizes, number, total, "the same" if counted == total else f"{counted:,}")
        for (axis, kind, _), (sizes, number, total, counted) in found.items()
    ]
    passed = [stage["passed_on"] for stage in stages if stage["passed_on"] is not None]
    for kind, sizes in (("copy of hidden states", passed[:-1]), ("copy of tokens, back", passed[-1:])):
        if sizes:
            rows.append(("pipe", kind, set(sizes), len(sizes), sum(sizes), "only counted"))
    return rows


def scaling_table(records: _Records) -> _Table:
    """Of records "scaling"."""
    head = ["model", "machine", "for", "degrees", "batch", "a token", "tokens/s", "memory a device", "communication"]
    rows = [[*head, "bubble", "speed of the first machine"]]
    for one in records:
        about = [one["model"], one["topology"], one["goal"]]
        if not one["fits"]:
            rows.append([*about, "does not fit", *[""] * 7])
            continue
        idle = one["devices"] - one["used_devices"]
        rows.append(
            [
                *about,
                str(Parallelism(**one["parallelism"])) + (f", {idle} idle" if idle else ""),
                str(one["batch"]),
                f"{one['seconds_per_token'] * 1e3:.2f} ms",
                f"{one['tokens_per_second']:,.0f}",
                gib(one["bytes_per_device"]),
                f"{one['communication']:.0%}",
                f"{one['bubble']:.0%}",
                f"x {one['speed_over_first']:.2f} with x {one['devices_over_first']:.0f} devices",
            ]
        )
    return rows


def notes_on(settings: Mapping[str, Any], host: _Records, pipeline: _Records, predicted: _Records) -> list[str]:
    """How to read the tables, and what is weak in them."""
    found: list[str] = [*_NOTES]
    left_out = [*settings["skipped"], *([] if pipeline else ["bubbles"])]
    if left_out:
        have = len(settings["devices"])
        found.append(f"left out, for JAX has {have} devices: {', '.join(left_out)}; JAX_PLATFORMS=cpu has virtual ones")
    found += [*_host_bound(host, predicted), *_little_gained(predicted)]
    return [*found, *_pipelines_part(settings["stages"], pipeline)]


def _pipelines_part(stages: int, records: _Records) -> Iterator[str]:
    for one in records:
        if one["section"] == "at once" and (over := one["over_slowest_alone"]).median > 1.4:
            yield (
                f"doubtful: all stages at once take {over.median:.2f} times as long as the slowest alone, with nothing"
                " to wait for, so this machine, as it was, cannot show what a pipeline gains"
            )
        if one["section"] != "bubble" or one["phase"] != "generation" or one["flush"]:
            continue
        if one["micro_batches"] == stages and (over := one["seconds_over_slowed"]).median > 1.03:
            yield (
                "weak: with as many micro-batches as stages, every hand-over from stage to stage is waited for:"
                f" {ratio_text(over)} times the schedule's time"
            )


def _host_bound(host: _Records, predicted: _Records) -> Iterator[str]:
    deepest = max(host, key=lambda one: (one["layers"], one["devices"]))
    steps = [one for one in predicted if one["fits"] and one["goal"] == "latency"]
    if steps and deepest["devices"] > 1:
        yield (
            f"weak: issuing {deepest['layers']} layers to {deepest['devices']} devices takes"
            f" {_milliseconds(deepest['issue'])} here, {_milliseconds(deepest['processor'])} of it work of the calling"
            f" thread; for all of a step of"
            f" {steps[0]['model']} on {steps[0]['topology']} the cost model has"
            f" {steps[0]['seconds_per_token'] * 1e3:.2f} ms, and takes the host's part to be hidden behind that"
        )


def _little_gained(predicted: _Records) -> Iterator[str]:
    for one in predicted:
        if one["fits"] and one["speed_over_first"] < 0.5 * one["devices_over_first"]:
            yield (
                f"weak, predicted: {one['model']} on {one['topology']} for {one['goal']} gains a factor of"
                f" {one['speed_over_first']:.2f} from {one['devices_over_first']:.0f} times the devices, of which"
                f" {one['used_devices']} are used; {one['communication']:.0%} of a token's way is communication"
            )
