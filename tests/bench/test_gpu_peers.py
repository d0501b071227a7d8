"""Programs beside us: a process that answers when it is ready, PyTorch's loop, and PyTorch's models."""

import contextlib
import sys
from typing import Any

import pytest

from jdsi.bench.gpu import torch_peers
from jdsi.bench.gpu.stage_worker import Task
from jdsi.bench.gpu.torch_peer import Stream
from jdsi.bench.processes import PeerProcess
from jdsi.errors import ConfigError

# Ready when it is told so by a file; then it answers with what it was asked, or says what is wrong.
PROGRAM = """
import json, pathlib, sys, time
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if "end" in asked:
        sys.exit(3)
    print(json.dumps({"error": "no"} if "bad" in asked else asked), flush=True)
"""


def test_a_peer_is_waited_for_no_longer_than_one_likes(tmp_path: Any) -> None:
    told = tmp_path / "told"
    with contextlib.closing(PeerProcess("it", [sys.executable, "-c", PROGRAM, str(told)], waits=False)) as peer:
        assert peer.answer(0.0) is None
        assert peer.answer(-1.0) is None
        assert not peer.ready
        told.touch()
        assert peer.answer(60.0) == {"ready": True} == peer.ready
        assert peer.ask(number=5) == {"number": 5}
        peer.begin(number=6)
        assert peer.answer(60.0) == {"number": 6}
        with pytest.raises(ConfigError, match="peer 'it': no"):
            peer.ask(bad=True)
        peer.begin(end=True)
        with pytest.raises(ConfigError, match="ended with status 3"):
            peer.answer(60.0)
        with pytest.raises(ConfigError, match="ended with status 3"):
            peer.ask(number=7)


def collect() -> tuple[Task, list[Any]]:
    found: list[Any] = []
    return Task(lambda message: found.append(message), seconds=1000, rehearsal=True), found


def test_peers_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    task, found = collect()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with torch_peers.open_decoders(task, ["transformers", "torch.compile"], "llama-8b") as opened:
        assert not opened
    assert found == [{"what": "transformers, torch.compile", "by": "", "skipped": "PyTorch is not installed"}]
    with pytest.raises(ConfigError, match="did you mean 'transformers'"):
        torch_peers.decoding_peer("transformer", "llama-8b", task, tiny=True)


class Peer:
    """A peer that is ready, or not."""

    def __init__(self, why: str | None) -> None:
        self._why = why

    def ready(self, within: float) -> str | None:
        return self._why

    def seconds(self, **request: Any) -> float:
        return float(request["batch"])


def test_a_peer_that_is_late_is_named_and_the_others_run() -> None:
    task, found = collect()
    peers: Any = {"quick": Peer(None), "late": Peer("it was not ready within 5 s")}
    runs = torch_peers.contenders(task, "batch 3", peers, {"batch": 3}, reserve=1)
    assert {name: run() for name, run in runs.items()} == {"quick": 3.0}
    assert found == [{"what": "batch 3", "by": "late", "failed": "it was not ready within 5 s"}]


def test_the_loop_in_pytorch_uses_every_layer_once() -> None:
    """On a CPU nothing overlaps; what is copied, and where to, is the same."""
    stream = Stream(5, [(6, 4), (8, 6)], "cpu")
    copied: list[int] = []
    usual = stream._copy
    stream._copy = lambda layer, after: (copied.append(layer), usual(layer, after))[1]
    assert stream.run(rows=3) > 0
    assert copied == [0, 1, 2, 3, 4]
    for buffers, layer in zip(stream._buffers, (4, 3), strict=True):
        for buffer, source in zip(buffers, stream._host[layer], strict=True):
            assert (buffer == source).all()


@pytest.mark.slow  # a process that imports torch and transformers, and has a model compiled
def test_pytorch_s_programs_answer() -> None:
    task, found = collect()
    with torch_peers.open_decoders(task, ["transformers", "torch.compile"], "gpt-2-xl") as opened:
        request = torch_peers.decode_request(1, tiny=True)
        runs = torch_peers.contenders(task, "batch 1", opened, request, reserve=0)
        assert not found
        assert runs.keys() == {"transformers", "torch.compile"}
        for run in runs.values():
            run()
        assert opened["transformers"].seconds(do="prefill", batch=2, length=8) > 0
