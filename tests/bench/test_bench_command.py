"""Every benchmark at a tiny size: what it reports, never how fast it was."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from checkpoints import save_llama
from jdsi.bench.report import environment
from jdsi.cli.app import app
from jdsi.errors import ConfigError

TINY = ("--shape", "llama-tiny", "--rounds", "2")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def report(*arguments: str) -> dict[str, Any]:
    return json.loads(run(*arguments, "--json"))


def test_decode() -> None:
    found = report("decode", *TINY, "--batch", "1,3", "--prompt", "5", "--new-tokens", "6", "--peer", "transformers")
    assert found["environment"]["packages"].keys() >= {"jdsi", "jax", "torch", "transformers"}
    assert found["environment"]["cores"] >= 1
    assert found["environment"]["cpu"]
    assert [result["batch"] for result in found["results"]] == [1, 3]
    for result in found["results"]:
        wanted = {"jdsi", "transformers", "limit"} | ({"chain"} if result["batch"] > 1 else set())
        assert result["contenders"].keys() == wanted
        assert result["bytes_per_step"] == 4 * (2 * (48 * 128 + 3 * 48 * 80) + 300 * 48)
        peer = result["contenders"]["transformers"]
        assert peer["equal_tokens"] == peer["compared_tokens"] == 7 * result["batch"]
        assert len(peer["seconds_per_step"]["rounds"]) == 2
        ratio = result["jdsi_speed_over"]["transformers"]
        assert ratio["minimum"] <= ratio["median"] <= ratio["maximum"]


def test_decode_of_a_checkpoint_of_ones_own_as_a_table(tmp_path: Path) -> None:
    save_llama(tmp_path)
    table = run("decode", str(tmp_path), "--batch", "2", "--prompt", "4", "--new-tokens", "2", "--rounds", "1")
    for word in ("batch", "jdsi", "limit", "chain", "tokens/s", "GB/s", "cores"):
        assert word in table


def test_prefill() -> None:
    found = report("prefill", *TINY, "--tokens", "32", "--peer", "transformers", "--matmul-size", "64")
    (result,) = found["results"]
    ours, peer = result["contenders"]["jdsi"], result["contenders"]["transformers"]
    assert ours["next_token"] == peer["next_token"]
    linear = 2 * 32 * 2 * (48 * 128 + 3 * 48 * 80)
    attention = 2 * 6 * (32 * 33 // 2) * 2 * (8 + 8)
    assert ours["flops"] == peer["flops"] == linear + 2 * 300 * 48 + attention
    assert math.isclose(result["share_of_matmul_rate"]["matmul"]["median"], 1)


def test_start(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else a program that takes now a little less than the least time to be kept, and now a little more, is a miss.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # see compilation
    cold, warm, _ = report("start", "--shape", "llama-tiny", "--rounds", "1", "--prompt", "4")["results"]
    assert cold["tokens"] == warm["tokens"]
    assert cold["cache_hits"] == [0]
    assert warm["cache_misses"] == [0]
    assert cold["stages"].keys() >= {"interpreter", "import", "load", "first_token"}


def test_memory_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goals and verdicts from invented peaks: 10 MB over the baseline is too much for so small a model's loading."""

    def answer(job: str, **settings: Any) -> dict[str, Any]:
        if job == "load":
            peaks.append(500_000_000 + 10_000_000 * len(peaks))
            return {"peak": peaks[-1], "bytes": 1_000_000, "seconds": 1.0}
        settings["destination"].mkdir()
        (settings["destination"] / "file").write_bytes(bytes(12_345))
        return {"peak": 600_000_000, "bytes": 2_000_000, "seconds": 1.0}

    peaks: list[int] = []
    monkeypatch.setattr("jdsi.bench.memory.ask", answer)
    results = report("memory", "--shape", "llama-tiny", "--gigabytes", "0.01")["results"]
    assert [result["within"] for result in results] == [False, False, False, True, True]
    assert results[0]["over_weights"] == 10.0
    assert results[3]["terms"] == {
        "largest_group": 2 * 2 * (256 * 256 * 8 + 256),
        "largest_file": 12_345,
        "constant": 3e8,
    }
    assert results[3]["goal"] == sum(results[3]["terms"].values())


@pytest.mark.slow
def test_memory(tmp_path: Path) -> None:
    options = ("--gigabytes", "0.05", "--max-shard-size", "10MB", "--folder", str(tmp_path))
    results = report("memory", "--shape", "llama-tiny", "--rounds", "1", *options)["results"]
    assert [result["what"].split()[0] for result in results] == ["load"] * 3 + ["convert"] * 2
    orbax, hf = results[3:]
    assert orbax["bytes"] == hf["bytes"] >= 0.05e9
    assert orbax["within"]
    assert hf["within"]
    assert 9e6 < hf["terms"]["largest_file"] <= 10.1e6
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def interrupted(*_: object, **__: object) -> None:
        assert list(tmp_path.rglob("model.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr("jdsi.bench.memory.ask", interrupted)
    result = CliRunner().invoke(app, ["bench", "memory", "--shape", "llama-tiny", "--gigabytes", "0"])
    assert result.exit_code != 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("decode", "--shape", "llama-125"), "llama-125m"),
        (("decode", "--batch", "1;2"), "numbers with commas"),
        (("decode", "--batch", "0"), "positive"),
        (("decode", "--dtype", "int8"), "float32"),
        (("decode", "--peer", "transformer"), "'transformers'"),
        (("decode", "--shape", "llama-tiny", "--peer", "llama.cpp", "--dtype", "bfloat16"), "float32 only"),
        (("prefill", "--tokens", "0"), "positive"),
        (("prefill", "--peer", "llama.cpp"), "known are transformers"),
        (("start", "--rounds", "0"), "positive"),
        (("memory", "--gigabytes", "-1"), "not negative"),
        (("memory", "--max-shard-size", "many"), "size"),
        (("memory", "--dtype", "int8"), "bfloat16"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(*arguments)


def test_a_peer_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"jdsi\[torch\]"):
        run("prefill", "--shape", "llama-tiny", "--peer", "transformers")


def test_the_environment_is_json() -> None:
    assert json.loads(json.dumps(environment()))["memory_bytes"] > 0
