"""Weights that are prepared before they are used: where they lie, and that it makes no difference when they are."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import jdsi
from checkpoints import save_llama
from jdsi.converters import convert, load_model
from jdsi.converters.block_store import BlockStore
from jdsi.models import parameters
from jdsi.runtime import weight_supply
from jdsi.runtime.layer_programs import LayerPrograms
from jdsi.runtime.offload import footprint_on
from jdsi.runtime.residency import Residency, plan_residency
from jdsi.runtime.streamed import StreamedExecutor
from jdsi.runtime.weight_supply import WeightSupply
from jdsi.sharding import make_mesh

LAYERS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in float32, in bfloat16 and in int8."""
    root = tmp_path_factory.mktemp("supply")
    save_llama(root / "hf", num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=96, num_attention_heads=8)
    convert(root / "hf", root / "float32", to="streaming")
    convert(root / "hf", root / "bfloat16", to="streaming", dtype="bfloat16")
    convert(root / "hf", root / "int8", to="streaming", quantize="int8", group_size=32)
    return root


def all_streamed(store: BlockStore, slots: int = 3) -> Residency:
    planned = plan_residency(footprint_on(store, np.dtype("float32")), None)
    names = tuple(f"layers.{i}" for i in range(LAYERS))
    return Residency(frozenset(store.blocks) - set(names), names, slots, planned.nbytes)


@contextlib.contextmanager
def supply_of(folder: Path, slots: int = 3) -> Iterator[WeightSupply]:
    store = BlockStore.open(folder)
    mesh = make_mesh(devices=jax.local_devices()[:1])
    programs = LayerPrograms(store.spec, mesh, "float32", None)
    with contextlib.closing(WeightSupply(store, all_streamed(store, slots), mesh, programs, None)) as supply:
        yield supply


def pointers(arrays: dict[str, jax.Array]) -> list[int]:
    return sorted(array.unsafe_buffer_pointer() for array in arrays.values())


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("folder", ["bfloat16", "int8"])
def test_layers_are_prepared_in_the_same_memory(root: Path, folder: str, batches: int) -> None:
    wanted = parameters(load_model(root / folder, dtype="float32"))
    with supply_of(root / folder) as supply:
        places = []
        for index in [*range(LAYERS)] * 2:
            with supply.layer(index, batches) as (block, _):
                places.append(pointers(block.arrays))
                for name, array in block.arrays.items():
                    np.testing.assert_array_equal(array, wanted[f"layers.{index}.{name}"])
        assert all(place == places[0] for place in places)


def test_a_buffer_is_free_as_soon_as_its_layer_is_prepared(root: Path) -> None:
    with supply_of(root / "bfloat16", slots=1) as supply, supply.layer(0, 1):
        for _ in range(200):
            report = supply.report()
            assert report is not None
            if report.blocks == 2:
                return
            time.sleep(0.05)
        pytest.fail("the next layer was not read while this one was in use, though there is a buffer")


def test_a_layer_that_is_used_as_it_is_stored_keeps_its_buffer(root: Path) -> None:
    with supply_of(root / "float32", slots=1) as supply:
        with supply.layer(0, 2):
            time.sleep(0.3)
            report = supply.report()
            assert report is not None
            assert report.blocks == 1
        with supply.layer(1, 2):
            pass


@pytest.mark.parametrize("folder", ["bfloat16", "int8"])
def test_a_single_batch_may_prepare_within_its_program(
    root: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does on a GPU: the tokens are the same, and no memory stays behind for a pass that does not use it."""
    monkeypatch.setattr(weight_supply, "worth_preparing", lambda batches: batches > 1)
    prompts = [[5, 9, 2, 7], [11, 4, 4, 60, 33], [3]]
    sampling = jdsi.SamplingParams(max_new_tokens=5, ignore_eos=True)
    store = BlockStore.open(root / folder)
    loaded = jdsi.init_inference(root / folder, dtype="float32")
    expected = [completion.token_ids for completion in loaded.generate(prompts, sampling)]
    executor = StreamedExecutor(store, all_streamed(store), dtype="float32", batches_per_pass=2)
    engine = jdsi.InferenceEngine(executor, jdsi.InferenceConfig(dtype="float32", max_batch_size=1))
    with contextlib.closing(engine):
        # Two of them share passes, and the third one's follow.
        assert [completion.token_ids for completion in engine.generate(prompts, sampling)] == expected
        assert not executor._weights._prepared
        engine.generate(prompts[:2], sampling)
        assert len(executor._weights._prepared) == 1
