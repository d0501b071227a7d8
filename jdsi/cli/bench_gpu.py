"""`jdsi bench gpu`: one command that measures everything on a GPU, and shows what it found."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jdsi.errors import ConfigError

from .bench import AsJson


def gpu(
    output: Annotated[Path, typer.Option(help="The report to write, a JSON file.")] = Path("gpu-report.json"),
    minutes: Annotated[
        float | None, typer.Option(help="For everything but --tune; by default 8, with --rehearse 30.")
    ] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="Only this stage, or all of a kind, as 'right'; may be repeated.")
    ] = None,
    tests: Annotated[
        Path | None, typer.Option(help="Run the GPU tests in this folder first, within the same minutes.")
    ] = None,
    tune: Annotated[float, typer.Option(help="So many minutes more tune what fell short.", metavar="MINUTES")] = 0.0,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Try it without a GPU: tiny sizes, kernels interpreted and compiled.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing report.")] = False,
    show: Annotated[
        Path | None, typer.Option(help="Measure nothing: print this report as Markdown and draw its roofline.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Where --show draws to; by default beside the report, as .png.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check and measure everything on a Hopper GPU in eight minutes, into a report that is whole at every moment.

    See docs/gpu-report.md.
    """
    if show is None and picture is not None:
        raise ConfigError("--picture goes with --show: a report is drawn once there is one")
    from jdsi.bench.gpu.journal import read_report
    from jdsi.bench.gpu.run import bench_gpu
    from jdsi.bench.gpu.show import is_measured, markdown, summary

    if show is not None:
        report = read_report(show)
        sys.stdout.write(json.dumps(report) + "\n" if as_json else markdown(report))
        _draw(report, picture or show.with_suffix(".png"), asked=picture is not None)
        return
    report = bench_gpu(
        output, minutes=minutes, rehearse=rehearse, stages=stage or (), tests=tests, tune=tune, overwrite=overwrite
    )
    # Short, for the end of an output is what is read first; --show has the rest.
    sys.stdout.write(json.dumps(report) + "\n" if as_json else summary(report))
    if report["interrupted"]:
        raise typer.Exit(130)
    whole = all(one["state"] == "done" for one in report["stages"])
    if not (whole if rehearse else is_measured(report)):
        raise typer.Exit(1)


def _draw(report: dict[str, Any], path: Path, *, asked: bool) -> None:
    """Draws the roofline; where that cannot be, says so, and fails if a picture was asked for."""
    from jdsi.bench.gpu.picture import draw

    try:
        draw(report, path)
    except ConfigError as error:
        if asked:
            raise
        sys.stderr.write(f"jdsi: no picture: {error}\n")
    else:
        sys.stderr.write(f"jdsi: drawn: {path}\n")
