"""Matching a checkpoint with a table: everything that is wrong, in one report."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jdsi.converters import TensorInfo
from jdsi.converters.matching import by_table_name, match
from jdsi.converters.safetensors_file import SafetensorsWriter, read_into
from jdsi.converters.sources import MappedParameters
from jdsi.errors import CheckpointError, JdsiWarning
from jdsi.models.weight_map import (
    Identity,
    Op,
    Rows,
    Transpose,
    WeightMap,
    fused,
    split_heads_last,
    split_query_groups,
    tensor,
)

MAP = WeightMap(
    (
        tensor("embedding", "model.embed"),
        fused("qkv", ["model.q", "model.k"], [4, 2]),
        tensor("head", "lm_head"),
    ),
    prefix="model.",
    ignored=(r"model\.mask\.\d+",),
)
SHAPES = {"embedding": (5, 3), "qkv": (6, 3), "head": (5, 3)}
GOOD = {"model.embed": (5, 3), "model.q": (4, 3), "model.k": (2, 3), "lm_head": (5, 3)}


def infos(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {n: TensorInfo(n, np.dtype(np.float32), s, Path("folder/a.safetensors")) for n, s in shapes.items()}


def fitted(stored: Mapping[str, tuple[int, ...]], *, strict: bool = True) -> dict[str, TensorInfo]:
    return match(by_table_name(infos(stored), MAP), MAP, SHAPES, where="here", strict=strict)


def test_matches_with_and_without_the_prefix() -> None:
    assert {n: i.name for n, i in fitted(GOOD).items()} == {n: n for n in GOOD}
    bare = {name.removeprefix("model."): shape for name, shape in GOOD.items()} | {"mask.3": (1,)}
    found = fitted(bare)
    assert found["model.q"].name == "q"
    assert found["lm_head"].name == "lm_head"


def test_reports_everything_at_once() -> None:
    stored = GOOD | {"model.k": (3, 3), "model.embedd": (5, 3), "extra": (1,), "model.mask.1": (9,)}
    del stored["model.embed"]
    with pytest.raises(CheckpointError) as caught:
        fitted(stored)
    text = str(caught.value)
    assert "1 missing:\n    model.embed (there is 'model.embedd')" in text
    assert "model.k in a.safetensors: (3, 3), wanted (2, 3)" in text
    assert "2 not known to this family:\n    model.embedd in a.safetensors\n    extra in a.safetensors" in text
    assert "mask" not in text


def test_what_is_not_used_is_named_unless_it_is_strict() -> None:
    stored = GOOD | {"v_head.weight": (1, 3), "model.mask.1": (9,)}
    with pytest.warns(JdsiWarning, match=r"here: not used by this model: v_head\.weight$"):
        assert fitted(stored, strict=False).keys() == GOOD.keys()
    with pytest.raises(CheckpointError, match=r"1 not known to this family:\n    v_head\.weight in a\.safetensors"):
        fitted(stored)


def test_a_name_that_is_current_comes_before_one_that_is_renamed_to_it() -> None:
    table = WeightMap((tensor("norm", "norm.weight"),), renamed=((r"(.*)\.gamma", r"\1.weight"),))
    for names in (["norm.gamma", "norm.weight"], ["norm.weight", "norm.gamma"]):
        assert by_table_name(infos(dict.fromkeys(names, (3,))), table)["norm.weight"].name == "norm.weight"
    assert by_table_name(infos({"norm.gamma": (3,)}), table)["norm.weight"].name == "norm.gamma"


def test_long_reports_are_cut_with_a_count() -> None:
    with pytest.raises(CheckpointError) as caught:
        fitted(GOOD | {f"extra.{i}": (1,) for i in range(50)})
    assert "50 not known" in str(caught.value)
    assert "... and 30 more" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 25


def test_a_table_that_does_not_cover_the_model() -> None:
    with pytest.raises(CheckpointError, match="disagree about bias"):
        match(infos(GOOD), MAP, SHAPES | {"bias": (3,)}, where="folder")


@given(
    missing=st.sets(st.sampled_from(sorted(GOOD))),
    misshapen=st.sets(st.sampled_from(sorted(GOOD))),
    extra=st.sets(st.text(min_size=1).filter(lambda s: s not in GOOD and "model" not in s and s.isprintable())),
)
def test_reports_exactly_what_is_wrong(missing: set[str], misshapen: set[str], extra: set[str]) -> None:
    misshapen -= missing
    stored = {n: (9, *s) if n in misshapen else s for n, s in GOOD.items() if n not in missing}
    stored["model.mask.0"] = (1,)  # keeps the prefix in use
    stored |= dict.fromkeys(extra, (1,))
    if not (missing or misshapen or extra):
        assert fitted(stored).keys() == GOOD.keys()
        return
    with pytest.raises(CheckpointError) as caught:
        fitted(stored)
    text = str(caught.value)
    assert (f"{len(missing)} missing" in text) == bool(missing)
    assert (f"{len(misshapen)} of another shape" in text) == bool(misshapen)
    assert (f"{len(extra)} not known" in text) == bool(extra)
    assert all(name in text for name in missing | misshapen)


OPS: list[tuple[Op, int]] = [
    (Identity(), 12),
    (Transpose(), 12),
    (Rows(tuple(np.random.default_rng(0).permutation(12).tolist())), 12),
    (split_heads_last(2, 3, 2), 12),
    (split_query_groups(4, 2, 2), 16),
]


class Store:
    """Tensors of one safetensors file."""

    def __init__(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        from jdsi.converters.safetensors_file import read_header

        with SafetensorsWriter(path, {n: (a.dtype, a.shape) for n, a in arrays.items()}) as writer:
            for name, array in arrays.items():
                writer.write(name, array)
        self.label = str(path)
        self.tensors = read_header(path)[0]
        self.read_into = read_into


@pytest.mark.parametrize(("op", "rows"), OPS)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_reading_through_every_op_and_back(tmp_path: Path, op: Op, rows: int, parts: int, dtype: type) -> None:
    kept = np.random.default_rng(1).standard_normal((parts * rows, 5), np.float32)
    names = [f"part{i}" for i in range(parts)]
    entry = tensor("ours", names[0], op) if parts == 1 else fused("ours", names, [rows] * parts, op)
    pieces = np.split(kept, parts)
    stored = {name: np.ascontiguousarray(op.inverse(piece)) for name, piece in zip(names, pieces, strict=True)}
    store = Store(tmp_path / "a.safetensors", stored)
    source = MappedParameters(store, store.tensors, WeightMap((entry,)), {"ours": kept.shape})
    seen: list[str] = []
    got = source.read("ours", np.dtype(dtype), lambda name, _: seen.append(name))
    np.testing.assert_array_equal(got, kept.astype(dtype))
    assert got.ctypes.data % 64 == 0
    assert seen == names
    for name, piece in zip(names, pieces, strict=True):
        np.testing.assert_array_equal(op.inverse(op.forward(stored[name])), stored[name])
        assert op.inverse_shape(piece.shape) == stored[name].shape
