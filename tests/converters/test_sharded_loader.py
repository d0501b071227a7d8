"""Loading onto a mesh: every device has its share, no byte is read that no share holds, and memory stays bounded."""

import itertools
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig

from jdsi.converters import (
    NonFiniteWarning,
    abstract_shares,
    convert,
    from_arrays,
    load_model,
    load_sharded,
    open_model,
    random_checkpoint,
)
from jdsi.converters.boxes import read_boxes
from jdsi.converters.config import load_family
from jdsi.converters.safetensors_file import SafetensorsWriter, read_header, read_into
from jdsi.converters.sources import MappedParameters, MemoryParameters
from jdsi.converters.torch_file import TorchFile
from jdsi.errors import CheckpointError, ConfigError
from jdsi.models import parameters
from jdsi.models.weight_map import (
    Entry,
    Identity,
    Op,
    Rows,
    Source,
    Transpose,
    WeightMap,
    split_heads_last,
    split_query_groups,
)
from jdsi.sharding import Run, Split, make_mesh, stage_meshes
from sharded import CONFIGS, counted_reads, save, share_of
from without_torch import WITHOUT_TORCH


def mesh_of(tensor: int, data: int = 1) -> jax.sharding.Mesh:
    return stage_meshes(make_mesh(tensor=tensor, data=data))[0]


def load(folder: Path, mesh: jax.sharding.Mesh, names: Sequence[str] | None = None, **options: Any) -> dict:
    options = {"dtype": "float32"} | options
    return load_sharded(open_model(folder), mesh, names, **options)


def check_shares(folder: Path, arrays: dict[str, jax.Array], plain: dict[str, np.ndarray], tensor: int) -> None:
    """Every device holds the share that its place on the mesh asks for."""
    spec = load_family(folder)[1]
    assert arrays.keys() == plain.keys()
    for name, array in arrays.items():
        ranks = {device: at[-1] for at, device in np.ndenumerate(array.sharding.mesh.devices)}
        assert len(array.addressable_shards) == len(ranks)
        for shard in array.addressable_shards:
            wanted = share_of(spec, name, plain[name], tensor, ranks[shard.device])
            np.testing.assert_array_equal(shard.data, wanted, err_msg=f"{name} on rank {ranks[shard.device]}")


def plain_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in parameters(load_model(folder, dtype="float32")).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_device_has_its_share_and_nothing_else_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(name, tmp_path)
    plain, spec = plain_of(tmp_path), load_family(tmp_path)[1]
    for tensor, data in [(1, 1), (2, 1), (3, 2), (4, 1), (8, 1)]:
        mesh = mesh_of(tensor, data)
        with counted_reads(monkeypatch) as count:
            arrays = load(tmp_path, mesh)
            read = count()
        check_shares(tmp_path, arrays, plain, tensor)
        # Ones mark what is on disk, padding being zeros; what the mesh replicates is read once.
        wanted = 0
        for parameter, array in plain.items():
            ranks = 1 if arrays[parameter].is_fully_replicated else tensor
            ones = np.ones_like(array)
            shares = [share_of(spec, parameter, ones, tensor, rank) for rank in range(ranks)]
            wanted += sum(int(share.sum()) for share in shares) * array.itemsize
        assert read == wanted
        abstract = abstract_shares(spec, mesh, dtype="float32")
        assert {n: (a.shape, a.dtype, a.sharding) for n, a in arrays.items()} == {
            n: (a.shape, a.dtype, a.sharding) for n, a in abstract.items()
        }


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint with transposed tensors in every layout there is."""
    root = tmp_path_factory.mktemp("layouts")
    save("gpt2", root / "hf")
    for to in ("orbax", "streaming"):
        convert(root / "hf", root / to, to=to)
    convert(root / "hf", root / "sharded", to="sharded", tensor_parallel=3)
    (root / "bin").mkdir()
    (root / "bin" / "config.json").write_text((root / "hf" / "config.json").read_text())
    state = {name: torch.from_numpy(array) for name, array in load_file(root / "hf" / "model.safetensors").items()}
    torch.save(state, root / "bin" / "pytorch_model.bin")
    return root


class Counter:
    """A progress that adds up."""

    def __init__(self) -> None:
        self.total = self.done = self.finished = 0

    def start(self, total_bytes: int) -> None:
        self.total = total_bytes

    def advance(self, num_bytes: int) -> None:
        self.done += num_bytes

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("layout", ["hf", "bin", "orbax", "streaming", "sharded", "memory"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_layout_gives_the_same_shares(layout: str, dtype: str, stored: Path) -> None:
    plain = {name: array.astype(jnp.dtype(dtype)) for name, array in plain_of(stored / "hf").items()}
    for tensor in (1, 2, 3):
        counter, mesh = Counter(), mesh_of(tensor)
        if layout == "memory":
            model = load_model(stored / "hf")
            arrays = from_arrays(parameters(model), model.spec, mesh, dtype=dtype, progress=counter)
        else:
            arrays = load(stored / layout, mesh, dtype=dtype, progress=counter)
        assert {str(array.dtype) for array in arrays.values()} == {dtype}
        check_shares(stored / "hf", arrays, plain, tensor)
        assert counter.finished == 1
        assert counter.done == counter.total


def test_a_stage_loads_its_own_parameters(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = plain_of(stored / "hf")
    names = [name for name in plain if name.startswith("layers.1.")]
    with counted_reads(monkeypatch) as count:
        arrays = load(stored / "hf", mesh_of(2), names)
        assert 0 < count() < sum(plain[name].nbytes for name in names) + 1
    check_shares(stored / "hf", arrays, {name: plain[name] for name in names}, 2)
    with pytest.raises(ValueError, match=r"not parameters of this gpt2: layers\.9\.norm"):
        load(stored / "hf", mesh_of(2), [*names, "layers.9.norm"])
    model = load_model(stored / "hf")
    assert from_arrays(parameters(model), model.spec, mesh_of(2), names).keys() == set(names)
    with pytest.raises(ValueError, match=r"absent, or not of the shape this gpt2 has: norm\.bias"):
        from_arrays(dict(arrays), model.spec, mesh_of(2), ["norm.bias"])
    with pytest.raises(ConfigError, match="float31"):
        load(stored / "hf", mesh_of(2), dtype="float31")


def test_replicas_share_memory_and_are_read_once(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted_reads(monkeypatch) as count:
        load(stored / "hf", mesh_of(2))
        once = count()
    with counted_reads(monkeypatch) as count:
        arrays = load(stored / "hf", mesh_of(2, 4))
        assert count() == once
    for array in arrays.values():
        places = {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}
        assert len(places) == (1 if array.is_fully_replicated else 2)


def _missing(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def _truncated(folder: Path) -> None:
    file = folder / "model-00003-of-00003.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def _misshapen(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.norm.weight" in tensors:
            save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"][1:].copy()}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_missing, "not there: model-00002"), (_truncated, "truncated"), (_misshapen, r"model\.norm\.weight in .*wanted")],
)
def test_damage_is_found_before_anything_is_on_a_device(
    damage: Callable[[Path], None],
    message: str,
    tmp_path: Path,
    tiny_config: Callable[..., LlamaConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random_checkpoint(tmp_path / "hf", tiny_config(), dtype="float32", max_shard_size="50KB")
    assert len(list((tmp_path / "hf").glob("model-*"))) == 3
    damage(tmp_path / "hf")
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("put on a device"))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "hf", mesh_of(2), ["layers.0.attention.qkv.weight"])


def test_nan_in_a_share_is_told(hf_folder: Path) -> None:
    tensors = load_file(hf_folder / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"][3, 39] = np.nan
    save_file(tensors, hf_folder / "model.safetensors")
    with pytest.warns(NonFiniteWarning, match=r"1 tensors: model\.layers\.0\.self_attn\.o_proj"):
        load(hf_folder, mesh_of(2))


def ops(rows: int) -> st.SearchStrategy[Op]:
    orders = st.permutations(range(rows)).map(lambda order: Rows(tuple(order)))
    grouped = [split_heads_last(rows // 6, 3, 2)] if rows % 6 == 0 else []
    grouped += [split_query_groups(2, 1, rows // 4)] if rows % 4 == 0 else []
    return st.one_of(st.just(Identity()), st.just(Transpose()), orders, *map(st.just, grouped))


@st.composite
def splits(draw: st.DrawFn, length: int, dim: int) -> Split:
    """Any split: runs of any entries, in any order, with padding between them."""
    ranks = []
    for _ in range(draw(st.integers(1, 3))):
        runs, target = [], 0
        for _ in range(draw(st.integers(0, 3))):
            start = draw(st.integers(0, length - 1))
            stop = draw(st.integers(start + 1, length))
            target += draw(st.integers(0, 2))
            runs.append(Run(start, stop, target))
            target += stop - start
        ranks.append((tuple(runs), target))
    size = max(target for _, target in ranks) + draw(st.integers(0, 2)) or 1
    return Split(dim, size, tuple(runs for runs, _ in ranks))


class Store:
    """Tensors of one file, safetensors or PyTorch's."""

    def __init__(self, path: Path, arrays: dict[str, np.ndarray], *, pickled: bool) -> None:
        self.label = str(path)
        if pickled:
            torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
            file = TorchFile(path)
            self.tensors, self.read_into, self.read_boxes = file.tensors, file.read_into, file.read_boxes
            return
        path.unlink(missing_ok=True)
        with SafetensorsWriter(path, {n: (a.dtype, a.shape) for n, a in arrays.items()}) as writer:
            for name, array in arrays.items():
                writer.write(name, array)
        self.tensors, self.read_into, self.read_boxes = read_header(path)[0], read_into, read_boxes


class Blocks:
    """A watch that keeps what it sees."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []

    def __call__(self, name: str, block: np.ndarray) -> None:
        self.blocks.append(block.copy())


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_share_through_any_op(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    draw = data.draw
    columns = draw(st.one_of(st.none(), st.integers(1, 9)))
    rows = draw(st.lists(st.sampled_from([1, 5, 8, 12]), min_size=1, max_size=3))
    dtype = np.dtype(draw(st.sampled_from(["float32", "float16"])))
    shape = (sum(rows), *([] if columns is None else [columns]))
    plain = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    arrays, sources = {}, []
    for i, (piece, count) in enumerate(zip(np.split(plain, np.cumsum(rows)[:-1]), rows, strict=True)):
        op = draw(ops(count))
        arrays[f"part{i}"] = np.ascontiguousarray(op.inverse(piece))
        sources.append(Source(f"part{i}", op, count))
    store = Store(tmp_path_factory.mktemp("any") / "file", arrays, pickled=draw(st.booleans()))
    source = MappedParameters(store, store.tensors, WeightMap((Entry("ours", tuple(sources)),)), {"ours": shape})
    dim = draw(st.integers(0, len(shape) - 1))
    split = draw(splits(shape[dim], dim))
    memory = MemoryParameters({"ours": jnp.asarray(plain)})
    for rank, runs in enumerate(split.runs):
        wanted = np.zeros(split.local_shape(shape), dtype)
        for run, (at, entry) in itertools.product(runs, enumerate(range(shape[dim]))):
            if run.start <= at < run.stop:
                target = run.target + at - run.start
                np.moveaxis(wanted, dim, 0)[target] = np.moveaxis(plain, dim, 0)[entry]
        seen = Blocks()
        got = source.read_share("ours", dtype, split, rank, seen)
        np.testing.assert_array_equal(got, wanted)
        assert got.dtype == dtype
        assert got.flags.c_contiguous
        assert got.ctypes.data % 64 == 0
        assert sum(block.nbytes for block in seen.blocks) == sum(map(len, runs)) * wanted.nbytes // split.size
        assert all(block.ndim == 1 and block.dtype == dtype for block in seen.blocks)
        np.testing.assert_array_equal(memory.read_share("ours", dtype, split, rank, lambda *_: None), wanted)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_boxes_of_any_tensor(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    path = tmp_path_factory.mktemp("boxes") / "file"
    store = Store(path, {"a": values}, pickled=False)
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    box = tuple(slice(first, last) for first, last in bounds)
    dtype = np.dtype(data.draw(st.sampled_from(["float32", "float16"])))
    out = np.zeros(tuple(last - first for first, last in bounds), dtype)
    if data.draw(st.booleans()):
        out = np.zeros(out.shape[::-1], dtype).T  # of other strides
    with pytest.MonkeyPatch.context() as patch, pytest.MonkeyPatch.context() as blocks:
        blocks.setattr("jdsi.converters.boxes.BLOCK_BYTES", 32)
        with counted_reads(patch) as count:
            read_boxes(store.tensors["a"], [(box, out)])
            assert count() == out.size * 4
    np.testing.assert_array_equal(out, values[box].astype(dtype))
    with pytest.raises(ValueError, match="into an array of shape"):
        read_boxes(store.tensors["a"], [((slice(0, 7),) * len(shape), np.zeros((7,) * len(shape), np.float32))])
    os.truncate(path, store.tensors["a"].offset)
    if out.size:
        with pytest.raises(CheckpointError, match="the file ends at byte"):
            read_boxes(store.tensors["a"], [(box, out)])


MEASURED = """
    import sys
    import jax, numpy
    from transformers import AutoConfig
    from jdsi.converters import load_sharded, open_model
    from jdsi.sharding import make_mesh, stage_meshes

    def memory(key):
        with open("/proc/self/status") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith(key))

    for device in jax.devices():
        jax.device_put(numpy.ones(8), device).block_until_ready()
    mesh = stage_meshes(make_mesh(tensor=2, data=2))[0]
    base = memory("VmRSS")
    arrays = load_sharded(open_model(sys.argv[1]), mesh, dtype="float32")
    shards = {s.data.unsafe_buffer_pointer(): s.data.nbytes for a in arrays.values() for s in a.addressable_shards}
    print(sum(shards.values()), memory("VmHWM") - base)
"""


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_memory_is_the_shards_and_one_tensor(
    kind: str, tmp_path: Path, tiny_config: Callable[..., LlamaConfig]
) -> None:
    from transformers import GPT2Config

    wide = tiny_config(
        vocab_size=8000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8
    )
    config = wide if kind == "llama" else GPT2Config(vocab_size=8000, n_embd=1024, n_layer=4, n_head=8)
    source = random_checkpoint(tmp_path / "hf", config, dtype="bfloat16")
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_TORCH + textwrap.dedent(MEASURED), str(source)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    kept, over = map(int, done.stdout.split())
    assert kept > 150e6
    # Beside the shards: a tensor at most, and the framework's first use.
    assert over < 1.02 * kept + 4 * 8000 * 1024 + 30e6


PROCESS = """
    import sys
    from pathlib import Path
    import jax, numpy as np
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    port, index, folder, out = sys.argv[1:]
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
    import os
    from jdsi.converters import ShardedParameters, load_sharded, load_spec, open_model
    from jdsi.errors import CheckpointError
    from jdsi.sharding import make_mesh, stage_meshes

    real, read = os.preadv, [0]
    def preadv(*arguments):
        count = real(*arguments)
        read[0] += count
        return count
    os.preadv = preadv
    mesh = stage_meshes(make_mesh(tensor=4))[0]
    arrays = load_sharded(open_model(folder), mesh, dtype="float32")
    found = {"read": np.array(read[0])}
    for name, array in arrays.items():
        assert not array.is_fully_addressable
        for shard in array.addressable_shards:
            found[f"{name}@{shard.device.id}"] = np.asarray(shard.data)
    total = jax.jit(lambda a: sum(jax.numpy.sum(x.astype("float64")) for x in a.values()))(arrays)
    found["total"] = np.asarray(total.addressable_data(0))
    source = ShardedParameters(arrays, load_spec(folder), 4)
    source.read("norm.weight", np.dtype("float32"), lambda *_: None)
    try:
        source.read("layers.0.attention.qkv.weight", np.dtype("float32"), lambda *_: None)
    except CheckpointError as error:
        found["error"] = np.array(str(error))
    np.savez(out, **found)
"""


def test_two_processes_read_their_own_shares(tmp_path: Path) -> None:
    save("llama-gqa", tmp_path / "hf")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_TORCH + textwrap.dedent(PROCESS), str(port)]
    running = [
        subprocess.Popen(
            [*command, str(index), str(tmp_path / "hf"), str(tmp_path / f"{index}.npz")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        for process in running:
            _, told = process.communicate(timeout=240)
            assert process.returncode == 0, told
    finally:
        for process in running:
            process.kill()
    plain, spec = plain_of(tmp_path / "hf"), load_family(tmp_path / "hf")[1]
    total = None
    for index in range(2):
        found = dict(np.load(tmp_path / f"{index}.npz"))
        read, error, added = (found.pop(key) for key in ("read", "error", "total"))
        total = added if total is None else total
        assert added == total
        devices = sorted({int(key.split("@")[1]) for key in found})
        assert len(devices) == 2
        wanted = 0
        for name, array in plain.items():
            split = False
            for rank, device in zip((2 * index, 2 * index + 1), devices, strict=True):
                share = share_of(spec, name, array, 4, rank)
                np.testing.assert_array_equal(found[f"{name}@{device}"], share)
                split = not np.array_equal(share, array)
                wanted += int(share_of(spec, name, np.ones_like(array), 4, rank).sum()) * 4
            wanted -= 0 if split else array.nbytes
        assert read == wanted
        elsewhere = [[2, 3], [0, 1]][index]
        assert f"layers.0.attention.qkv.weight: the shares of tensor ranks {elsewhere}" in str(error)
