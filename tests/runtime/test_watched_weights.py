"""Weights that are streamed are looked at when they are first read: NaN and overflow are told once, as elsewhere."""

import contextlib
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jdsi
from checkpoints import save_llama
from jdsi.converters import NonFiniteWarning, convert
from jdsi.converters.block_store import BlockStore
from jdsi.runtime.residency import Residency
from jdsi.runtime.streamed import StreamedExecutor
from jdsi.runtime.weight_sources import HostSource
from jdsi.sharding import make_mesh

BAD = ("layers.1.attention_norm.weight",)
LARGE = ("layers.0.attention.qkv.weight", "layers.1.feed_forward.down.weight")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("watched")
    save_llama(root / "hf")
    tensors = load_file(root / "hf" / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"][1, 2] = -65520  # the first that float16 rounds to infinity
    tensors["model.layers.0.self_attn.v_proj.weight"][1, 2] = 65519
    tensors["model.layers.1.mlp.down_proj.weight"][-1, -1] = 1e6
    convert_from = root / "large"
    save_llama(convert_from)
    save_file(tensors, convert_from / "model.safetensors", {"format": "pt"})
    convert(convert_from, root / "int8", to="streaming", quantize="int8")
    tensors["model.layers.1.input_layernorm.weight"][-1] = np.nan
    save_file(tensors, root / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.warns(NonFiniteWarning):
        convert(root / "hf", root / "cut", to="sharded", tensor_parallel=2)
    return root


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, NonFiniteWarning)]


@pytest.mark.parametrize(
    ("folder", "ranks", "memory"), [("hf", 1, False), ("hf", 2, True), ("cut", 2, False), ("int8", 1, False)]
)
def test_what_is_streamed_is_told_once(root: Path, folder: str, ranks: int, memory: bool) -> None:
    store = BlockStore.open(root / folder, tensor_parallel=ranks)
    streamed = ("embedding", "layers.0", "layers.1", "head")
    residency = Residency(frozenset(store.blocks) - set(streamed), streamed, slots=2, nbytes=0)
    mesh = make_mesh(tensor=ranks, data=1, devices=jax.local_devices()[:ranks])
    source = HostSource(store) if memory else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        executor = StreamedExecutor(store, residency, dtype="float16", mesh=mesh, source=source)
        engine = jdsi.InferenceEngine(executor, jdsi.InferenceConfig(dtype="float16"))
        with contextlib.closing(engine):
            engine.forward([[5, 6, 7]])
            assert len(told(caught)) == 1
            engine.forward([[5, 6, 7]])
    (message,) = told(caught)
    assert message.startswith(f"{root / folder}: ")
    bad = "" if folder == "int8" else f"NaN or infinite values in 1 tensors: {BAD[0]}; "
    assert f"{bad}values in 2 tensors are infinite as float16" in message
    assert message.endswith(", ".join(LARGE)), message


@pytest.mark.parametrize("where", ["host", "nvme"])
def test_an_engine_tells_what_stays(root: Path, where: str) -> None:
    with pytest.warns(NonFiniteWarning, match=r"NaN .*norm\.weight; values in 2 tensors are infinite as float16"):
        jdsi.init_inference(root / "hf", dtype="float16", offload=where, max_tokens=16).forward([[5, 6, 7]])
    with pytest.warns(NonFiniteWarning) as caught:
        jdsi.init_inference(root / "hf", dtype="float32", offload=where, max_tokens=16).forward([[5, 6, 7]])
    assert "float16" not in str(caught[0].message)
