"""A report for people, as Markdown: the goals first, then what every stage found."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .goals import goals_of

Result = Mapping[str, Any]
_SHOWN = ("seconds", "over", "error", "failed", "wrong")  # a row of the table has one of these; facts stand below it
_FIGURES = ("time", "GB/s", "TFLOP/s", "tokens/s", "share of the limit", "speed over")


def is_measured(report: Mapping[str, Any]) -> bool:
    """Whether figures in a report are those of a GPU: it is no rehearsal, and JAX computed on one."""
    vital = next((stage for stage in report["stages"] if stage["name"] == "machine"), None)
    return not report.get("rehearsal") and vital is not None and vital["state"] == "done"


def summary(report: Mapping[str, Any]) -> str:
    """What the report comes to: goals, kernels left out, how the stages went."""
    lines = [f"# {title(report)}", "", *_about(report), ""]
    lines += ["## Goals", "", *_table(_goal_rows(report)), ""]
    if left_out := _left_out(report):
        lines += ["## Kernels left out", "", *(f"- {line}" for line in left_out), ""]
    return "\n".join([*lines, "## Stages", "", *_table(_stage_rows(report))]) + "\n"


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report. Figures that were not measured on a GPU are left out."""
    measured = is_measured(report)
    lines = [summary(report)]
    for stage in report["stages"]:
        shown = [result for result in stage["results"] if any(result.get(key) is not None for key in _SHOWN)]
        below = [*(line for result in stage["results"] for line in _facts(result)), *_skipped(stage)]
        if shown or below:
            lines += [f"### {stage['name']}: {stage['title']}", ""]
            lines += [*_table(_result_rows(shown, measured)), ""] if shown else []
            lines += [*below, ""] if below else []
    return "\n".join(lines).rstrip() + "\n"


def title(report: Mapping[str, Any]) -> str:
    """What the report is, in a line that cannot be mistaken."""
    if report.get("rehearsal"):
        return "REHEARSAL without a GPU: nothing here is a measurement"
    facts = _all_facts(report, "machine")
    if not is_measured(report):
        return "NOT MEASURED: no GPU answered"
    return f"Measured on {facts.get('name') or facts.get('device')}, driver {facts.get('driver_version', 'unknown')}"


def _about(report: Mapping[str, Any]) -> Iterator[str]:
    facts = _all_facts(report, "machine")
    versions = [f"{name} {facts[name]}" for name in ("jdsi", "jax", "torch", "transformers") if name in facts]
    took = f", {report['seconds'] / 60:.1f} of them used" if "seconds" in report else ""
    yield f"{report['started']}, {report['settings']['minutes']:g} minutes{took}. {', '.join(versions)}".rstrip()
    if report.get("interrupted"):
        yield "It was interrupted."
    elif not report.get("finished"):
        yield "The program that wrote it was ended before the report was."


def _goal_rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows = [["goal", "wanted", "worst case", "median", "verdict"]]
    for goal in goals_of(report) if is_measured(report) else goals_of({**report, "stages": []}):
        wanted = f"{goal['wanted']:.2f}"
        if goal["met"] is None:
            rows.append([goal["goal"], wanted, "", "", "not measured"])
            continue
        verdict = f"{'met' if goal['met'] else 'MISSED'} by {abs(goal['by']):.0%}"
        worst = f"{goal['worst']:.2f}" + (f" ({goal['where']}, of {goal['cases']})" if goal["cases"] > 1 else "")
        rows.append([goal["goal"], wanted, worst, f"{goal['median']:.2f}", verdict])
    return rows


def _left_out(report: Mapping[str, Any]) -> list[str]:
    return [
        f"{operator}, {kernel}: {why}"
        for operator, kernels in report.get("left_out", {}).items()
        for kernel, why in kernels.items()
    ]


def _stage_rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows = [["stage", "state", "seconds", "up to", "why"]]
    for stage in report["stages"]:
        seconds = f"{stage['seconds']:.1f}" if "seconds" in stage else ""
        why = stage.get("why", "")
        if stage["state"] == "running":
            why = f"the program was ended while it was at: {stage.get('doing') or 'its beginning'}"
        rows.append([stage["name"], stage["state"], seconds, f"{stage['limit']:.0f}", why])
    return rows


def _result_rows(results: Sequence[Result], measured: bool) -> list[list[str]]:
    figures = _FIGURES if measured else ()
    rows = [["case", "of", *figures, "error", "note"]]
    for result in results:
        row = [result["what"], result["by"], *(_figures(result) if measured else ())]
        error = result.get("error")
        notes = [f"{word.upper()}: {result[word]}" for word in ("wrong", "failed") if result.get(word)]
        rows.append([*row, f"{error:.1e}" if isinstance(error, float) else str(error or ""), "; ".join(notes)])
    # A column that nobody fills says nothing.
    used = [i for i in range(len(rows[0])) if i < 2 or any(row[i] for row in rows[1:])]
    return [[row[i] for i in used] for row in rows]


def _figures(result: Result) -> Iterator[str]:
    seconds = _median(result.get("seconds"))
    yield _time(seconds)
    for name, unit in (("bytes", 1e9), ("flops", 1e12)):
        yield f"{result[name] / seconds / unit:.3g}" if seconds and result.get(name) else ""
    tokens = _median(result.get("tokens_per_second"))
    yield f"{tokens:.4g}" if tokens else ""
    yield _ratio(result.get("share"))
    yield "; ".join(f"{name} {_ratio(ratio)}" for name, ratio in (result.get("over") or {}).items())


def _median(spread: Any) -> float | None:
    found = spread["median"] if spread else None
    return found if isinstance(found, float) else None


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if abs(seconds) >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e6:.3g} us"


def _ratio(ratio: Any) -> str:
    if not ratio or not all(isinstance(ratio[key], float) for key in ("median", "minimum", "maximum")):
        return ""
    return f"{ratio['median']:.2f} ({ratio['minimum']:.2f} to {ratio['maximum']:.2f})"


def _facts(result: Result) -> Iterator[str]:
    if facts := result.get("facts"):
        by = f", {result['by']}" if result["by"] else ""
        yield f"- {result['what']}{by}: " + "; ".join(f"{name} {value}" for name, value in facts.items())


def _skipped(stage: Mapping[str, Any]) -> Iterator[str]:
    """A line for each reason that something was left out, with the first cases it holds for."""
    cases: dict[tuple[str, str], list[str]] = {}
    for result in stage["results"]:
        if why := result.get("skipped"):
            cases.setdefault((result["by"], why), []).append(result["what"])
    for (by, why), whats in cases.items():
        more = f" and {len(whats) - 2} more" if len(whats) > 2 else ""
        yield f"- left out{f', {by}' if by else ''}: {why} ({', '.join(whats[:2])}{more})"


def _all_facts(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The facts of all results of a stage."""
    found: dict[str, Any] = {}
    for stage in report["stages"]:
        for result in stage["results"] if stage["name"] == name else ():
            found |= result.get("facts") or {}
    return found


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(row)} |" for row in body]
