"""The offload benchmark at a tiny size: what it reports, and that a model runs under a cap that it does not fit."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import jdsi
from jdsi.bench.offload import compare_tokens, limits
from jdsi.bench.offload_cap import bench_offload_cap, run_offload
from jdsi.bench.offload_contenders import Turn
from jdsi.bench.offload_memory import streaming_limit
from jdsi.bench.report import Report, show
from jdsi.bench.shapes import shape_config, sized_config
from jdsi.cli.app import app
from jdsi.converters import convert, random_checkpoint
from jdsi.converters.block_store import BlockStore
from jdsi.errors import ConfigError

OURS = {"disk", "streamed x1", "streamed x2", "folder", "mmap", "in memory"}


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["bench", "offload", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def report(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Report:
    """What the command would show."""
    shown: list[Report] = []
    monkeypatch.setattr("jdsi.bench.report.show", lambda report, *, as_json: shown.append(report))
    run("--gigabytes", "0.01", "--batches-per-pass", "1,2", *arguments)
    return shown[0]


def check(report: Report, rounds: int, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    show(report, as_json=True)
    found = json.loads(capsys.readouterr().out)["results"]
    by_name = {result["what"]: result for result in found}
    assert len(by_name) == len(found)
    assert by_name["peak memory"]["within"]
    for name, result in by_name.items():
        if name == "peak memory":
            continue
        assert len(result["seconds"]["rounds"]) == rounds
        assert result["over_disk"]["minimum"] <= result["over_disk"]["median"] <= result["over_disk"]["maximum"]
        if name in ("streamed int8", "streamed int4"):
            assert "equal_tokens" not in result
        elif name != "disk":
            assert result["equal_tokens"] == result["compared_tokens"] > rounds
    for count in (1, 2):
        result = by_name[f"streamed x{count}"]
        rates = [count / taken for taken in result["seconds"]["rounds"]]
        assert result["tokens_per_second"]["rounds"] == pytest.approx(rates)
        assert set(result["limits"]["binds"]) <= {"disk", "compute"}
    # Of so few blocks those under way when a pass begins and when it ends are a large part.
    for name in {"disk", "streamed x1", "folder", "mmap", "streamed int8", "streamed int4"} & set(by_name):
        assert 0.4 <= by_name[name]["bytes_per_pass"]["median"] <= 1.6
    assert by_name["in memory"]["bytes_per_pass"]["median"] < 0.1
    return by_name


def test_ours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made = report(monkeypatch, "--rounds", "2", "--quantize", "int8", "--quantize", "int4")
    found = check(made, 2, capsys)
    assert found.keys() == OURS | {"peak memory", "streamed int8", "streamed int4"}
    plain = found["streamed x1"]["streamed_bytes"]
    assert 0.4 < found["streamed int8"]["streamed_bytes"] / plain < 0.6
    assert 0.2 < found["streamed int4"]["streamed_bytes"] / plain < 0.4
    show(made, as_json=False)
    table = capsys.readouterr().out
    for word in (*OURS, "over disk", "compute allows", "peak memory", "within"):
        assert word in table


@pytest.mark.slow  # two processes that import torch and transformers
def test_peers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    peers = ("--peer", "disk-offload", "--peer", "cpu-offload")
    found = check(report(monkeypatch, "--rounds", "1", *peers), 1, capsys)
    assert found.keys() == OURS | {"peak memory", "disk-offload", "cpu-offload"}
    assert found["disk-offload"]["bytes_per_pass"]["median"] >= 0.9  # not from the page cache
    assert found["cpu-offload"]["bytes_per_pass"]["median"] < 0.1


@pytest.mark.slow  # what a process takes beside weights differs from machine to machine, and the cap is tight
def test_a_model_larger_than_the_cap_runs_streamed_only(tmp_path: Path) -> None:
    """Memory may grow by 3/4 of the weights: loading must fail, and streaming give the tokens that there are without.

    Whatever the model, threads and compiling take some 50 MB of it, now more and now less.
    """
    source = random_checkpoint(tmp_path / "source", sized_config(0.24, 4, least_layers=32), dtype="float32")
    convert(source, tmp_path / "store", to="streaming")
    tiny = random_checkpoint(tmp_path / "tiny", shape_config("llama-tiny"), dtype="float32")
    store = BlockStore.open(tmp_path / "store")
    run = partial(run_offload, store.path, tiny, "float32")
    loaded = run("in memory", store.nbytes * 3 // 4, None)
    assert "alloc" in loaded["failed"].lower(), loaded
    streamed = run("streamed", store.nbytes * 3 // 4, streaming_limit(store, "float32"))
    assert "failed" not in streamed, streamed
    engine = jdsi.init_inference(source, dtype="float32", max_batch_size=1)
    sampling = jdsi.SamplingParams(max_new_tokens=len(streamed["tokens"]), ignore_eos=True)
    assert streamed["tokens"] == engine.generate([5, 9, 2, 7], sampling)[0].token_ids


@pytest.mark.slow
def test_the_cap_as_a_command() -> None:
    found = bench_offload_cap(gigabytes=0.3, dtype="float32", share=0.66).results
    loaded, streamed, elsewhere, in_memory, verdict = found
    assert "failed" in loaded
    assert verdict["loading_fails"]
    assert verdict["streaming_runs"], streamed
    assert verdict["same_tokens"]
    # Both of the others ran, each with weights in other places.
    assert elsewhere["streamed"] < streamed["streamed"]
    assert in_memory["streamed"] is None


def test_a_cap_too_small_says_what_streaming_takes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"streaming it takes [\d,]+ bytes"):
        run("--cap", "--gigabytes", "0.01", "--folder", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_limits_are_those_of_the_same_round() -> None:
    turns = {
        "disk": [Turn(4.0, 0), Turn(8.0, 0)],
        "in memory": [Turn(1.5, 0), Turn(1.0, 0)],
        "streamed x4": [Turn(8.0, 0), Turn(10.0, 0)],
    }
    found = limits(turns, "streamed x4", batch=3)
    assert found is not None
    assert found["binds"] == ["compute", "disk"]
    assert found["share"].rounds == (6.0 / 8.0, 8.0 / 10.0)
    assert found["disk_tokens_per_second"]["rounds"] == [12 / 4.0, 12 / 8.0]
    assert found["compute_tokens_per_second"]["rounds"] == [12 / 6.0, 12 / 4.0]
    assert limits({"disk": turns["disk"], "streamed x4": turns["streamed x4"]}, "streamed x4", batch=3) is None


class Said:
    """Tokens of two rows, with the margins they were chosen by."""

    def __init__(self, tokens: list[list[int]], margins: list[list[float]]) -> None:
        self.tokens, self.margins = [np.array(t) for t in tokens], [np.array(m) for m in margins]


def test_tokens_that_differ_are_told_with_their_margin(capsys: pytest.CaptureFixture[str]) -> None:
    reference = Said([[1, 2], [3, 4], [5, 6]], [[0.5, 0.6], [0.7, 2e-7], [0.8, 0.9]])
    other = Said([[1, 2], [3, 9], [5, 9], [7, 9]], [[1.0, 1.0]] * 4)
    found = compare_tokens("mmap", other, reference)
    assert found == {"equal_tokens": 4, "compared_tokens": 6, "margins_where_they_part": [2e-7]}
    assert "mmap gives other tokens in 1 of 2 rows" in capsys.readouterr().err
    assert compare_tokens("mmap", reference, reference)["margins_where_they_part"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rounds", "0"), "positive"),
        (("--batches-per-pass", "1;2"), "numbers with commas"),
        (("--batches-per-pass", "0"), "positive"),
        (("--dtype", "int8"), "bfloat16"),
        (("--compute-dtype", "int8"), "bfloat16"),
        (("--peer", "disk-ofload"), "did you mean 'disk-offload'"),
        (("--cap", "--peer", "disk-offload"), "leave out --peer"),
        (("--cap", "--gigabytes", "0"), "must be positive"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(*arguments)


def test_a_peer_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "accelerate" else object())
    with pytest.raises(ConfigError, match="needs accelerate, which is not installed: pip install accelerate"):
        run("--peer", "cpu-offload")
