"""Streaming folders with quantised matrices: what is stored, how far it is off, and that every use sees the same."""

import dataclasses
import itertools
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import jdsi
from checkpoints import save_llama
from jdsi.cli.app import app
from jdsi.converters import (
    MemoryParameters,
    convert,
    load_model,
    load_sharded,
    load_spec,
    open_checkpoint,
    open_model,
    random_checkpoint,
    save_parameters,
)
from jdsi.converters.direct_io import PAGE
from jdsi.converters.quantization import Quantization, dequantized
from jdsi.converters.streaming import StreamingCheckpoint
from jdsi.converters.streaming_layout import ALIGNMENT
from jdsi.errors import CheckpointError, ConfigError
from jdsi.models import parameters, parameters_of
from jdsi.models.spec import AttentionSpec, ClassifierSpec, HeadSpec, HeadTransform, RmsNormSpec
from jdsi.pallas_kernels.quantized_linear import WeightFormat, dequantize, quantize
from jdsi.sharding import make_mesh, stage_meshes
from parity import random_torch_model
from sharded import counted_reads, share_of
from zoo import CONFIGS, ENCODERS

LINEAR = [f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("attention.qkv", "attention.out")]
LINEAR += [f"layers.{i}.feed_forward.{part}.weight" for i in (0, 1) for part in ("up", "down")]


# As one program each, which takes less long to compile than one for every operation of theirs.
quantized, restored = jax.jit(quantize, static_argnums=1), jax.jit(dequantize, static_argnums=1)


def silent(name: str, block: np.ndarray) -> None:
    """A `Watch`."""


def opened(folder: Path) -> StreamingCheckpoint:
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, StreamingCheckpoint)
    return checkpoint


def stored_arrays(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of a quantised parameter, taken out of the file where the manifest says they are."""
    manifest = json.loads((folder / "jdsi.json").read_text())
    raw = (folder / "weights.bin").read_bytes()
    for group in manifest["groups"].values():
        if name in group["parameters"]:
            found = {}
            for part, what in group["parameters"][name]["quantization"]["arrays"].items():
                dtype, count = jnp.dtype(what["dtype"]), int(np.prod(what["shape"]))
                found[part] = np.frombuffer(raw, dtype, count, group["offset"] + what["offset"]).reshape(what["shape"])
            return found
    raise KeyError(name)


def assert_same_bits(a: Any, b: Any, name: str) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape) == (b.dtype, b.shape), name
    assert a.tobytes() == b.tobytes(), name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with inputs in multiples of 128, 64 and 32 and of none of them, in bfloat16 and in float32, quantised."""
    root = tmp_path_factory.mktemp("quantized")
    # out has 96 inputs, qkv, up and head 128, down 200.
    save_llama(root / "float32", hidden_size=128, num_attention_heads=4, head_dim=24, intermediate_size=200)
    convert(root / "float32", root / "bfloat16", to="hf", dtype="bfloat16")
    for dtype in ("float32", "bfloat16"):
        for kind in ("int8", "int4"):
            convert(root / dtype, root / f"{kind}-{dtype}", to="streaming", quantize=kind)
    return root


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_arrays_are_those_of_quantize_and_the_rest_is_as_it_was(kind: Any, dtype: str, root: Path) -> None:
    checkpoint = opened(root / f"{kind}-{dtype}")
    groups = {"qkv": 128, "out": 32, "up": 128, "down": None, "head": 128}
    before = parameters(load_model(root / dtype, dtype="float32"))
    wanted = {name for name in (*LINEAR, "head.weight") if kind == "int8" or ".down." not in name}
    assert checkpoint.quantized.keys() == wanted
    for name, array in before.items():
        assert checkpoint.dtypes[name] == jnp.dtype(dtype)
        plain = checkpoint.read(name, np.dtype(np.float32), silent)
        if name not in wanted:
            assert_same_bits(plain, array, name)
            continue
        form = WeightFormat(kind, groups[name.split(".")[-2]])
        assert checkpoint.quantized[name].format == form
        made, stored = quantized(array, form), stored_arrays(root / f"{kind}-{dtype}", name)
        assert stored.keys() == {"values", "scales"}
        assert_same_bits(stored["values"], made.values, name)
        assert_same_bits(stored["scales"], made.scales, name)
        assert_same_bits(plain, restored(made), name)
        # Half a step of each group, and what float32 rounds away of the product.
        scales = np.repeat(stored["scales"].astype(np.float32).T, array.shape[1] // stored["scales"].shape[0], axis=1)
        assert (np.abs(plain - array) <= 0.5 * scales * (1 + 2e-5)).all(), name
        assert np.abs(plain - array).max() > 0


def test_dtype_casts_what_is_not_quantised_and_does_not_round_twice(root: Path, tmp_path: Path) -> None:
    counted = Counter()
    convert(root / "float32", tmp_path / "cast", to="streaming", dtype="bfloat16", quantize="int8", progress=counted)
    cast, kept = opened(tmp_path / "cast"), opened(root / "int8-float32")
    assert {str(dtype) for dtype in cast.dtypes.values()} == {"bfloat16"}
    for name in kept.quantized:
        assert_same_bits(*(stored_arrays(c.path, name)["values"] for c in (cast, kept)), name)
    assert cast.read("norm.weight", np.dtype(jnp.bfloat16), silent).dtype == jnp.bfloat16
    assert counted.done == counted.total > 0


class Counter:
    """A progress that adds up."""

    def __init__(self) -> None:
        self.total = self.done = 0

    def start(self, total_bytes: int) -> None:
        self.total = total_bytes

    def advance(self, num_bytes: int) -> None:
        self.done += num_bytes

    def finish(self) -> None:
        pass


def test_arrays_lie_as_promised(root: Path) -> None:
    for folder in (root / "int8-bfloat16", root / "int4-float32"):
        manifest = json.loads((folder / "jdsi.json").read_text())
        assert manifest["version"] == 2
        for group in manifest["groups"].values():
            assert group["offset"] % PAGE == 0
            arrays = []
            for entry in group["parameters"].values():
                assert ("offset" in entry) != ("quantization" in entry)
                arrays += [*entry["quantization"]["arrays"].values()] if "quantization" in entry else [entry]
            arrays.sort(key=lambda array: array["offset"])
            assert all(array["offset"] % ALIGNMENT == 0 for array in arrays)
            types = [array["dtype"] for array in arrays]
            changes = sum(a != b for a, b in itertools.pairwise(types))
            assert changes == len(set(types)) - 1, types


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_device_and_read_give_identical_bits(kind: str, dtype: str, root: Path) -> None:
    checkpoint = opened(root / f"{kind}-float32")
    for name in ("layers.0.attention.out.weight", "head.weight"):
        form, stored = checkpoint.quantized[name].format, stored_arrays(checkpoint.path, name)
        read = checkpoint.read(name, jnp.dtype(dtype), silent)
        assert_same_bits(read, restored(quantized(stored_source(root, name), form), jnp.dtype(dtype)), name)
        made = jax.jit(lambda stored, form=form: dequantized(stored, form, jnp.dtype(dtype)))(stored)
        assert_same_bits(made, read, name)
        # Inside a program that widens the numbers again at once, where XLA would like to skip the rounding.
        x = jnp.linspace(-1, 1, read.shape[1])

        def use(matrix: jax.Array, x: jax.Array = x) -> jax.Array:
            return (matrix.astype(jnp.float32) * x).sum(1)

        inside = jax.jit(lambda stored, form=form, use=use: use(dequantized(stored, form, jnp.dtype(dtype))))(stored)
        assert_same_bits(inside, jax.jit(use)(read), name)


def stored_source(root: Path, name: str) -> jax.Array:
    return parameters(load_model(root / "float32", dtype="float32"))[name]


def test_numbers_near_the_ends_of_the_types_survive(root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "float32", tmp_path / "hf"))
    tensors = load_file(folder / "model.safetensors")
    head = tensors["lm_head.weight"]
    head[0], head[1], head[2, :64] = 2e-36, 3e38, 0
    head[3] = np.linspace(-3e-7, 3e-7, head.shape[1])  # float16 has them only without leading digits
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    convert(folder, tmp_path / "store", to="streaming", quantize="int8", group_size=64)
    checkpoint = opened(tmp_path / "store")
    stored, form = stored_arrays(tmp_path / "store", "head.weight"), checkpoint.quantized["head.weight"].format
    plain = checkpoint.read("head.weight", np.dtype(np.float32), silent)
    scales = np.repeat(stored["scales"].astype(np.float32).T, 64, axis=1)
    assert (np.abs(plain.astype(np.float64) - head) <= 0.5 * scales * (1 + 2e-5)).all()
    assert not plain[2, :64].any()
    for dtype in (np.dtype(np.float16), np.dtype(jnp.bfloat16)):
        read = checkpoint.read("head.weight", dtype, silent)
        assert_same_bits(jax.jit(lambda s, d=dtype: dequantized(s, form, d))(stored), read, str(dtype))
        with np.errstate(over="ignore"):
            assert_same_bits(read, plain.astype(dtype), str(dtype))


def test_any_box_is_a_cut_of_the_whole(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jdsi.converters.quantization._PIECE_BYTES", 4 * 128 * 7)
    for kind in ("int8", "int4"):
        checkpoint = opened(root / f"{kind}-bfloat16")
        for name in ("layers.1.attention.out.weight", "layers.1.feed_forward.down.weight", "head.weight"):
            whole = checkpoint.read(name, np.dtype(np.float32), silent)
            rows, columns = whole.shape
            boxes = [(slice(3, 41), slice(0, columns)), (slice(0, rows), slice(5, 71)), (slice(9, 10), slice(33, 34))]
            pieces = [(box, np.full((rows, columns), np.nan, jnp.bfloat16)[box]) for box in boxes]
            seen = bytearray()
            checkpoint.read_boxes(name, pieces, lambda _, block, seen=seen: seen.extend(block.tobytes()))
            for box, target in pieces:
                assert_same_bits(target, whole[box].astype(jnp.bfloat16), f"{name} {box}")
            assert seen == b"".join(target.tobytes() for _, target in pieces)
    with pytest.raises(CheckpointError, match=r"'head\.weight' is stored as bfloat16 and cannot be read as int8"):
        checkpoint.read("head.weight", np.dtype(np.int8), silent)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_an_engine_in_memory_runs_the_dequantised_weights(kind: str, root: Path, tmp_path: Path) -> None:
    store = root / f"{kind}-float32"
    convert(store, tmp_path / "plain", to="hf")
    convert(store, tmp_path / "again", to="streaming")
    assert not opened(tmp_path / "again").quantized
    engines = [jdsi.init_inference(folder, dtype="float32") for folder in (store, tmp_path / "plain", root / "float32")]
    prompts = [[5, 9, 2, 7], [11, 4]]
    quantised, plain, original = (np.asarray(engine.forward(prompts)) for engine in engines)
    assert_same_bits(quantised, plain, kind)
    assert np.abs(quantised - original).max() > 0
    tokens = [
        [c.token_ids for c in engine.generate(prompts, jdsi.SamplingParams(max_new_tokens=8))] for engine in engines
    ]
    assert tokens[0] == tokens[1]
    assert len(tokens[0][0]) == 8


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_mesh_reads_its_shares_and_no_more_than_whole_groups(
    kind: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = root / f"{kind}-bfloat16"
    plain = {name: np.asarray(array) for name, array in parameters(load_model(store, dtype="bfloat16")).items()}
    for tensor in (2, 3):
        mesh = stage_meshes(make_mesh(tensor=tensor))[0]
        arrays = load_sharded(open_model(store), mesh, dtype="bfloat16")
        for name, array in arrays.items():
            ranks = {device: at[-1] for at, device in np.ndenumerate(mesh.devices)}
            for shard in array.addressable_shards:
                assert_same_bits(
                    shard.data, share_of(load_spec(store), name, plain[name], tensor, ranks[shard.device]), name
                )
    up, out = (opened(store).quantized[f"layers.0.{name}.weight"] for name in ("feed_forward.up", "attention.out"))
    # Rows of up, all of them; columns 0 to 48 and 48 to 96 of out, in groups of 32: four groups of 128 rows.
    groups = 4 * 128 * (32 // (1 if kind == "int8" else 2) + out.arrays["scales"].dtype.itemsize)
    mesh = stage_meshes(make_mesh(tensor=2))[0]
    for name, wanted in {"feed_forward.up": up.nbytes, "attention.out": groups}.items():
        with counted_reads(monkeypatch) as count:
            names = [f"layers.0.{name}.weight"]
            load_sharded(open_model(store), mesh, names, dtype="bfloat16")
            assert count() == wanted, name


# Matrices as they are, transposed, with rows in another order, and an encoder's; the other families store the same.
TELLING = ("llama", "gpt2", "falcon", "bloom", "bert")


@pytest.mark.parametrize("family", [n if n in TELLING else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
def test_every_family_converts(family: str, tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(family, **CONFIGS[family])
    auto = transformers.AutoModelForMaskedLM if family in ENCODERS else transformers.AutoModelForCausalLM
    random_torch_model(config, auto).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "store", to="streaming", quantize="int8")
    checkpoint = opened(tmp_path / "store")
    checkpoint.verify()
    wanted = set(LINEAR) | ({"head.weight"} & checkpoint.shapes.keys())
    assert checkpoint.quantized.keys() == wanted
    before, after = (parameters(load_model(tmp_path / f, dtype="float32")) for f in ("hf", "store"))
    for name, array in before.items():
        difference = float(jnp.linalg.norm(after[name] - array) / jnp.linalg.norm(array))
        assert (0 < difference < 0.01) if name in wanted else difference == 0, name


def test_reports_and_checksums_cover_all_that_is_written(root: Path, tmp_path: Path) -> None:
    report = convert(root / "bfloat16", tmp_path / "store", to="streaming", quantize="int4", group_size=32)
    checkpoint = opened(tmp_path / "store")
    assert report.bytes == checkpoint.nbytes
    held = sum(group.nbytes for group in checkpoint.groups.values())
    assert report.bytes <= held <= (tmp_path / "store" / "weights.bin").stat().st_size
    form = checkpoint.quantized["layers.0.attention.qkv.weight"]
    assert form.format == WeightFormat("int4", 32)
    assert form.nbytes == 192 * 128 // 2 + 192 * 4 * 2
    for part, array in form.arrays.items():
        copy = Path(shutil.copytree(tmp_path / "store", tmp_path / part))
        with open(copy / "weights.bin", "r+b") as file:
            file.seek(checkpoint.groups["layers.0"].offset + array.offset)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 16]))
        with pytest.raises(CheckpointError, match=r"the checksum is wrong of layers\.0;"):
            opened(copy).verify()


def test_the_disk_is_asked_for_what_is_written(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = opened(root / "int4-bfloat16").nbytes + (16 << 20)
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1 << 40, 0, needed))
    convert(root / "bfloat16", tmp_path / "fits", to="streaming", quantize="int4")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1 << 40, 0, needed - 1))
    with pytest.raises(CheckpointError, match=f"too full: {needed:,} bytes needed"):
        convert(root / "bfloat16", tmp_path / "not", to="streaming", quantize="int4")


def test_memory_does_not_grow_with_the_model(tmp_path: Path, tiny_config: Callable[..., Any]) -> None:
    peaks = []
    for layers in (1, 6):
        config = tiny_config(num_hidden_layers=layers, hidden_size=512, num_attention_heads=8, intermediate_size=4096)
        folder = random_checkpoint(tmp_path / f"{layers}", config, dtype="bfloat16")
        tracemalloc.start()
        convert(folder, tmp_path / f"store{layers}", to="streaming", quantize="int8")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    matrix = 2 * 4096 * 512 * 2  # gate and up
    assert matrix < peaks[0] < 1.5 * matrix + (8 << 20)  # it, its numbers, a piece in float32
    assert peaks[1] < 1.05 * peaks[0] + (1 << 20)


def test_version_1_is_read(root: Path, tmp_path: Path) -> None:
    convert(root / "float32", tmp_path / "store", to="streaming")
    manifest = json.loads((tmp_path / "store" / "jdsi.json").read_text())
    (tmp_path / "store" / "jdsi.json").write_text(json.dumps(manifest | {"version": 1}))
    assert opened(tmp_path / "store").quantized == {}
    before, after = (parameters(load_model(f, dtype="float32")) for f in (root / "float32", tmp_path / "store"))
    for name, array in before.items():
        assert_same_bits(after[name], array, name)


def entry(manifest: dict[str, Any], name: str = "layers.0.attention.qkv.weight") -> dict[str, Any]:
    return manifest["groups"][name.split(".attention")[0]]["parameters"][name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["quantization"].update(kind="int5"), "damaged.*int5"),
        (lambda e: e["quantization"].update(kind=[]), "damaged"),
        (lambda e: e["quantization"].update(kind="fp8", group=None), "damaged.*no format of streaming"),
        (lambda e: e["quantization"].update(kind="int4"), "damaged.*int4"),
        (lambda e: e["quantization"].update(group=64), "damaged"),
        (lambda e: e["quantization"].update(group=128.0), "damaged"),
        (lambda e: e["quantization"].update(scale_dtype="float16"), "damaged"),
        (lambda e: e["quantization"].update(colour="red"), "damaged.*colour"),
        (lambda e: e["quantization"].pop("arrays"), "damaged.*arrays"),
        (lambda e: e.update(quantization=None), "damaged"),
        (lambda e: e["quantization"].update(arrays=[]), "damaged"),
        (lambda e: e["quantization"]["arrays"].pop("scales"), "damaged"),
        (lambda e: e["quantization"]["arrays"].update(zeros=e["quantization"]["arrays"]["scales"]), "damaged"),
        (lambda e: e["quantization"]["arrays"]["values"].update(shape=[192, 127]), "damaged"),
        (lambda e: e["quantization"]["arrays"]["values"].update(dtype="uint8"), "damaged"),
        (lambda e: e["quantization"]["arrays"]["values"].update(offset=64), "damaged.*at 64"),
        (lambda e: e["quantization"]["arrays"]["values"].update(offset=-128), "damaged.*at -128"),
        (lambda e: e["quantization"]["arrays"]["scales"].update(offset=0), "damaged.*qkv"),
        (lambda e: e["quantization"]["arrays"]["scales"].update(offset=1 << 30), r"damaged.*layers\.0 of"),
        (lambda e: e.update(shape=[192, 127]), "damaged"),
        (lambda e: e.update(shape=[192 * 128]), "damaged"),
        (lambda e: e.update(dtype="int8"), "damaged.*quantised from int8"),
        (lambda e: e.pop("quantization"), "damaged.*offset"),
    ],
)
def test_damaged_entries_are_named(change: Callable, message: str, root: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(root / "int8-bfloat16", tmp_path / "store"))
    manifest = json.loads((store / "jdsi.json").read_text())
    change(entry(manifest))
    (store / "jdsi.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=rf"store/jdsi\.json: {message}"):
        open_checkpoint(store)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "orbax", "quantize": "int8"}, "quantize='int8' is for to='streaming' only, not for to='orbax'"),
        ({"quantize": "int3"}, r"quantize='int3' \(did you mean 'int8'|quantize='int3' \(did you mean 'int4'"),
        ({"quantize": True}, "quantize=True: wanted is 'int8' or 'int4'"),
        ({"group_size": 64}, "group_size=64 is for quantize='int8' or 'int4', which is not given"),
        ({"quantize": "int8", "group_size": 48}, "group_size=48: wanted is 32, 64 or 128"),
        ({"quantize": "int8", "group_size": "64"}, "group_size='64': wanted is"),
    ],
)
def test_options_that_cannot_be_are_refused_first(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        convert("nobody/has-this-model", tmp_path / "out", **({"to": "streaming"} | options))


def test_sources_that_cannot_be_quantised_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int8-float32: already quantised; quantize what it was made of"):
        convert(root / "int8-float32", tmp_path / "out", to="streaming", quantize="int8")
    save_llama(tmp_path / "odd", hidden_size=48, intermediate_size=80)
    with pytest.raises(ConfigError, match=r"quantize='int4' changes nothing: .* multiples of 32; 'int8' takes any"):
        convert(tmp_path / "odd", tmp_path / "out", to="streaming", quantize="int4")
    model = parameters(load_model(root / "float32", dtype="float32"))
    name = "layers.1.attention.qkv.weight"
    for wrong, message in [
        (model[name].at[7, 9].set(jnp.nan), rf"parameter '{name}' holds NaN or infinity, which int8 has no numbers"),
        (model[name].astype(jnp.int32), rf"parameter '{name}' is stored as int32"),
    ]:
        source = MemoryParameters(model | {name: wrong})
        with pytest.raises(CheckpointError, match=message):
            save_parameters(source, tmp_path / "out", like=root / "float32", to="streaming", quantize="int8")
    assert not (tmp_path / "out").exists()


def test_groups_are_the_largest_that_fit(root: Path) -> None:
    def group(inputs: int, kind: str = "int8", size: int = 128) -> WeightFormat | None:
        return Quantization(kind, size).format_of(dataclasses.replace(head, shape=(5, inputs)))

    spec = load_spec(root / "bfloat16")
    head = parameters_of(spec)["head.weight"]

    assert group(384) == WeightFormat("int8", 128)
    assert group(384, size=64) == WeightFormat("int8", 64)
    assert group(192) == WeightFormat("int8", 64)
    assert group(96) == WeightFormat("int8", 32)
    assert group(40) == WeightFormat("int8")
    assert group(40, "int4") is None
    assert group(96, "int4", 64) == WeightFormat("int4", 32)
    qkv_bias = dataclasses.replace(spec.layers[0].of(AttentionSpec), qkv_bias=True, qk_norm=RmsNormSpec(1e-6))
    others = dataclasses.replace(
        spec,
        layers=(spec.layers[0].replaced(qkv_bias),),
        head=HeadSpec(tied=False, bias=True, transform=HeadTransform("gelu", RmsNormSpec(1e-6))),
        classifier=ClassifierSpec(("a", "b"), "tanh"),
    )
    quantized = Quantization("int8").formats(parameters_of(others))
    products = ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")
    assert quantized.keys() == {"head.weight", *(f"layers.0.{product}.weight" for product in products)}


def test_the_command_converts_and_inspects(root: Path, tmp_path: Path) -> None:
    runner, store = CliRunner(), tmp_path / "store"
    options = ["--to", "streaming", "--quantize", "int8", "--group-size", "64", "--json"]
    done = runner.invoke(app, ["convert", str(root / "bfloat16"), str(store), *options])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    shown = json.loads(runner.invoke(app, ["inspect", str(store), "--verify", "--json"]).stdout)
    assert shown["stored_bytes"] == report["bytes"] == opened(store).nbytes
    assert len(shown["quantization"]) == 9
    qkv = shown["quantization"]["layers.1.attention.qkv.weight"]
    assert qkv == {
        "kind": "int8",
        "group": 64,
        "blocks": False,
        "zero_points": False,
        "scale_dtype": "bfloat16",
        "bytes": 192 * 128 + 192 * 2 * 2,
        "of": "bfloat16",
    }
    text = runner.invoke(app, ["inspect", str(store), "--parameters"]).stdout
    assert "5 matrices in int8, groups of 64" in text
    assert "2 matrices in int8, groups of 32" in text
    assert "2 matrices in int8, one scale a row" in text
    assert "stored in" in text
    plain = json.loads(runner.invoke(app, ["inspect", str(root / "bfloat16"), "--json"]).stdout)
    assert (plain["stored_bytes"], plain["quantization"]) == (None, {})
    wrong = runner.invoke(app, ["convert", str(root / "bfloat16"), str(store), "--quantize", "int3"])
    assert wrong.exit_code == 2
    assert "int3" in wrong.output
