"""`jdsi tune`: the fastest implementation and configuration of every operator on this GPU."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .bench import AsJson, Match, Operators, Rounds


def tune(
    op: Operators = None,
    match: Match = "",
    implementation: Annotated[
        list[str] | None, typer.Option(help="Kernels to tune: pallas or triton; may be repeated; by default all.")
    ] = None,
    rounds: Rounds = 5,
    output: Annotated[
        Path | None, typer.Option(help="Tuning table to write; by default $JDSI_TUNING or one in the cache folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time every kernel and configuration on this GPU and remember the fastest that gives the right results.

    Each finding is written at once, so an interrupted run loses only the one in progress.
    """
    from jdsi.bench import Change, Failure, Selection, tune_kernels
    from jdsi.bench.report import environment
    from jdsi.pallas_kernels import tuning

    table = output or tuning.user_table()
    found: list[Change | Failure] = []
    interrupted = False
    try:
        selection = Selection(op or (), match)
        for outcome in tune_kernels(selection, implementations=implementation or (), rounds=rounds, output=table):
            found.append(outcome)
            if not as_json:
                sys.stdout.write(f"{outcome.operator}, {outcome.bucket}: {_text(outcome)}\n")
                sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
    if as_json:
        outcomes = [{"tuned": isinstance(one, Change), **dataclasses.asdict(one)} for one in found]
        report = {"table": str(table), "environment": environment(), "interrupted": interrupted, "outcomes": outcomes}
        json.dump(report, sys.stdout)
        sys.stdout.write("\n")
    else:
        sys.stdout.write(f"{sum(isinstance(one, Change) for one in found)} entries written to {table}\n")
    if interrupted:
        raise typer.Exit(130)


def _text(outcome: Any) -> str:
    from jdsi.bench import Failure
    from jdsi.bench.report import ratio_text

    if isinstance(outcome, Failure):
        return f"left as it is, {', '.join(outcome.arguments)}: {outcome.reason}"
    took = f"{outcome.microseconds:.1f} us, {ratio_text(outcome.speed_over_xla)} times as fast as XLA"
    if outcome.before == outcome.after:
        return f"stays {outcome.after}: {took}"
    gain = f", {ratio_text(outcome.speed)} times as fast as before" if outcome.speed else ""
    return f"{outcome.before} -> {outcome.after}: {took}{gain}"
