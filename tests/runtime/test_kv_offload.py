"""Keys, values and hidden states outside the devices: the same tokens wherever they lie between their turns."""

import contextlib
from pathlib import Path

import jax
import numpy as np
import pytest

import jdsi
from checkpoints import save_llama
from jdsi.converters.block_store import BlockStore
from jdsi.runtime.kv_offload import FileSlabs, HostSlabs, Offloaded, SlabStore
from jdsi.runtime.offload import footprint_on
from jdsi.runtime.residency import plan_residency
from jdsi.runtime.streamed import StreamedExecutor
from jdsi.runtime.waiting import Waiting
from jdsi.sharding import DATA, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = [[5, 9, 2, 7], [11, 4, 4, 60, 33, 21, 8], [3], [8, 8, 1], [70, 71]]
SAMPLINGS = (
    jdsi.SamplingParams(max_new_tokens=7, ignore_eos=True),
    jdsi.SamplingParams(max_new_tokens=5, num_beams=2),
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kv") / "llama"
    save_llama(folder, num_hidden_layers=5)
    return folder


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[list[list[int]]]:
    plain = jdsi.init_inference(llama, dtype="float32", max_batch_size=2)
    return [[c.token_ids for c in plain.generate(PROMPTS, sampling)] for sampling in SAMPLINGS]


@pytest.mark.parametrize(
    ("home", "degrees", "link"),
    [
        ("host", {}, 1),
        pytest.param("file", {}, 1, marks=pytest.mark.slow),
        ("host", {"tensor": 2, "data": 2}, 2),
        ("file", {"tensor": 2}, 2),
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_where_kv_lies(
    home: str, degrees: dict[str, int], link: int, llama: Path, expected: list[list[list[int]]], tmp_path: Path
) -> None:
    store = BlockStore.open(llama)
    slabs = SlabStore(HostSlabs() if home == "host" else FileSlabs(tmp_path))
    executor = StreamedExecutor(
        store,
        plan_residency(footprint_on(store, np.dtype("float32")), None),
        dtype="float32",
        mesh=make_mesh(**degrees) if degrees else None,
        batches_per_pass=3,
        cache=Offloaded(slabs, link),
        park=True,
    )
    engine = jdsi.InferenceEngine(executor, jdsi.InferenceConfig(dtype="float32", max_batch_size=2))
    with contextlib.closing(engine):
        for sampling, tokens in zip(SAMPLINGS, expected, strict=True):
            assert [c.token_ids for c in engine.generate(PROMPTS, sampling)] == tokens
        report = engine.stats.stream
        assert report is not None
        assert report.kv_bytes_read > 0
        assert report.kv_bytes_written > 0
        # A generation that is given up leaves nothing taken that the next one needs, and its room is used again.
        next(iter(engine.stream(PROMPTS[0], SAMPLINGS[0])))
        assert [c.token_ids for c in engine.generate(PROMPTS, SAMPLINGS[0])] == expected[0]


def test_the_engine_spills_where_it_is_told(llama: Path, expected: list[list[list[int]]], tmp_path: Path) -> None:
    settings = {"offload": "nvme", "memory_limit": "500MiB", "max_batch_size": 2, "max_tokens": 64}
    engine = jdsi.init_inference(llama, dtype="float32", kv_offload="nvme", spill_folder=tmp_path, **settings)
    with contextlib.closing(engine):
        assert [c.token_ids for c in engine.generate(PROMPTS, SAMPLINGS[0])] == expected[0]
        assert list(tmp_path.iterdir()) == []  # the file has no name
        assert "keys and values" in engine.stats.summary()
    engine = jdsi.init_inference(llama, dtype="float32", kv_offload="host", **settings)
    with contextlib.closing(engine):
        assert [c.token_ids for c in engine.generate(PROMPTS, SAMPLINGS[0])] == expected[0]
    with pytest.raises(jdsi.ConfigError, match=r"no spill file can be made in .*absent"):
        jdsi.init_inference(llama, kv_offload="nvme", spill_folder=tmp_path / "absent", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_offload": "nvme"}, "kv_offload is for"),
        ({"offload": "nvme", "kv_offload": "nvm"}, "did you mean 'nvme'"),
        ({"offload": "nvme", "spill_folder": "x"}, "spill_folder is for kv_offload='nvme'"),
        ({"offload": "nvme", "devices_per_link": 2}, "devices_per_link is for kv_offload"),
        ({"offload": "nvme", "kv_offload": "host", "devices_per_link": 0}, "at least 1"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict, message: str) -> None:
    with pytest.raises(jdsi.ConfigError, match=message):
        jdsi.InferenceConfig.from_dict(settings)


def test_hidden_states_that_wait_are_in_host_memory() -> None:
    mesh = make_mesh(data=2)
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(DATA))
    waiting = Waiting(4, here, park=True)
    for i in range(4):
        waiting.put(i, jax.device_put(np.full((4, 3), i, np.float32), here))
    for _ in range(2):
        for i in range(4):
            hidden = waiting.take(i)
            assert hidden.sharding.memory_kind == "device"
            np.testing.assert_array_equal(hidden, np.full((4, 3), i, np.float32))
            assert {x.sharding.memory_kind for x in waiting._held if x is not None} == {"pinned_host"}
            waiting.put(i, hidden)
