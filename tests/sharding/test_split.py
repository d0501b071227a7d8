"""How dimensions are divided among ranks: nothing is lost, heads stay together, no share is larger than it must be."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdsi.models import abstract_parameters, splits_of
from jdsi.models.spec import (
    AttentionSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerSpec,
    MlpSpec,
    PreNorm,
    RmsNormSpec,
    TransformerSpec,
)
from jdsi.models.tensor_parallel import local_spec
from jdsi.sharding import Run, Split, joined, split_evenly, split_heads

RANKS = st.integers(1, 12)
NORM = RmsNormSpec(1e-6)


def held(split: Split) -> list[list[int]]:
    """Per rank the plain entries at each place of its share; -1 for padding."""
    out = []
    for runs in split.runs:
        places = [-1] * split.size
        for run in runs:
            assert len(run) > 0
            assert places[run.target : run.target + len(run)] == [-1] * len(run), "runs overlap or leave the share"
            places[run.target : run.target + len(run)] = range(run.start, run.stop)
        out.append(places)
    return out


def entries(split: Split) -> list[int]:
    """Every entry that is on some rank, sorted, repeated for every rank that has it."""
    return sorted(entry for places in held(split) for entry in places if entry >= 0)


@given(st.integers(1, 500), RANKS, st.sampled_from([1, 4, 16]))
def test_even_shares(size: int, ranks: int, multiple: int) -> None:
    split = split_evenly(size, ranks, multiple=multiple)
    assert split.ranks == ranks
    assert entries(split) == list(range(size))
    least = math.ceil(size / ranks)
    assert split.size == (least if size % ranks == 0 else math.ceil(least / multiple) * multiple)
    # Where an entry lies follows from its number alone, which is how a rank knows its part of the vocabulary.
    for rank, places in enumerate(held(split)):
        assert all(entry in (-1, rank * split.size + place) for place, entry in enumerate(places))


@given(st.integers(1, 12), st.integers(1, 12), RANKS)
def test_heads(num_kv_heads: int, group: int, ranks: int) -> None:
    num_heads = num_kv_heads * group
    split = split_heads(num_heads, num_kv_heads, ranks)
    assert len(split.heads) == len(split.kv_heads) == ranks
    assert split.num_heads % split.num_kv_heads == 0
    queries = [head for start, stop in split.heads for head in range(start, stop)]
    assert sorted(queries) == list(range(num_heads))
    assert {head for start, stop in split.kv_heads for head in range(start, stop)} == set(range(num_kv_heads))
    local_group = split.num_heads // split.num_kv_heads
    for (first, last), (kv_first, kv_last) in zip(split.heads, split.kv_heads, strict=True):
        assert last - first <= split.num_heads
        assert kv_last - kv_first <= split.num_kv_heads
        for head in range(first, last):  # local query head i reads local KV head i // local_group
            assert kv_first + (head - first) // local_group == head // group < kv_last
    # The least there can be: of whole groups, or of one group among the ranks that share its KV head.
    if num_kv_heads >= ranks:
        assert split.num_kv_heads == math.ceil(num_kv_heads / ranks)
        assert local_group == group
    else:
        assert split.num_kv_heads == 1
        assert split.num_heads == math.ceil(group / (ranks // num_kv_heads))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), RANKS, st.sampled_from([1, 8]))
def test_joined_stretches_are_each_divided(sizes: list[int], ranks: int, multiple: int) -> None:
    parts = [split_evenly(size, ranks, multiple=multiple) for size in sizes]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    bounds = [[(r[0].start, r[0].stop) if r else (0, 0) for r in part.runs] for part in parts]
    split = joined(1, [(s, p.size, b) for s, p, b in zip(starts, parts, bounds, strict=True)])
    assert split.dim == 1
    assert split.size == sum(part.size for part in parts)
    assert entries(split) == list(range(sum(sizes)))
    target = 0
    for start, part in zip(starts, parts, strict=True):
        for rank, places in enumerate(held(part)):
            wanted = [entry if entry < 0 else start + entry for entry in places]
            assert held(split)[rank][target : target + part.size] == wanted
        target += part.size


def test_shapes() -> None:
    split = Split(1, 4, ((Run(0, 4, 0),), (Run(4, 6, 0),), ()))
    assert split.ranks == 3
    assert split.local_shape((7, 6, 5)) == (7, 4, 5)
    assert split.global_shape((7, 6, 5)) == (7, 12, 5)


@st.composite
def specs(draw: st.DrawFn) -> TransformerSpec:
    kv, group, dim, width = (draw(st.integers(1, high)) for high in (5, 4, 4, 8))
    attention = AttentionSpec(kv * group, kv, dim, 1.0, qkv_bias=draw(st.booleans()), out_bias=draw(st.booleans()))
    mlp = MlpSpec(draw(st.integers(1, 70)), "silu", gated=draw(st.booleans()), bias=draw(st.booleans()))
    return TransformerSpec(
        family="none",
        vocab_size=draw(st.integers(1, 70)),
        width=width,
        max_positions=8,
        embedding=EmbeddingSpec(),
        layers=(LayerSpec((attention, mlp), PreNorm(NORM)),),
        norm=NORM,
        head=HeadSpec(tied=draw(st.booleans()), bias=draw(st.booleans())),
    )


@settings(max_examples=60, deadline=None)  # building a model takes its time
@given(specs(), st.integers(1, 6))
def test_parameters_of_a_model(spec: TransformerSpec, ranks: int) -> None:
    local = {name: leaf.shape for name, leaf in abstract_parameters(local_spec(spec, ranks)).items()}
    attention, mlp = spec.layers[0].of(AttentionSpec), spec.layers[0].of(MlpSpec)
    splits, heads = splits_of(spec, ranks), split_heads(attention.num_heads, attention.num_kv_heads, ranks)
    q, k, _ = attention.qkv_rows
    for name, leaf in abstract_parameters(spec).items():
        split = splits[name]
        if split is None:
            assert local[name] == leaf.shape
            continue
        # The share is exactly what a layer of the rank's own spec is made for.
        assert split.local_shape(leaf.shape) == local[name]
        found = entries(split)
        assert set(found) == set(range(leaf.shape[split.dim]))
        if ".qkv." not in name:
            assert len(found) == len(set(found))
            continue
        assert [e for e in found if e < q] == list(range(q))
        for rank, places in enumerate(held(split)):
            rows = heads.num_heads * attention.head_dim
            keys = heads.num_kv_heads * attention.head_dim
            values = places[rows + keys :]
            for part, start, of in (
                (places[:rows], 0, heads.heads),
                (places[rows : rows + keys], q, heads.kv_heads),
                (values, q + k, heads.kv_heads),
            ):
                first, last = (start + head * attention.head_dim for head in of[rank])
                assert part == [*range(first, last), *[-1] * (len(part) - (last - first))]
    gate_up = splits["layers.0.feed_forward.up.weight"]
    down = splits["layers.0.feed_forward.down.weight"]
    if gate_up is not None and down is not None:  # hidden unit i of a rank goes into column i of its `down`
        for places, columns in zip(held(gate_up), held(down), strict=True):
            assert places[: down.size] == columns
            if mlp.gated:
                assert places[down.size :] == [c if c < 0 else c + mlp.width for c in columns]


@pytest.mark.parametrize("ranks", [1, 3])
def test_output_columns_follow_the_query_heads(ranks: int) -> None:
    attention = AttentionSpec(6, 2, 4, 1.0)
    spec = TransformerSpec(
        "none", 11, 8, 8, EmbeddingSpec(), (LayerSpec((attention, MlpSpec(9, "silu")), PreNorm(NORM)),), NORM, None
    )
    qkv, out = (splits_of(spec, ranks)[f"layers.0.attention.{part}.weight"] for part in ("qkv", "out"))
    if ranks == 1:
        assert qkv is out is None
        return
    assert qkv is not None
    assert out is not None
    assert out.dim == 1
    for rows, columns in zip(held(qkv), held(out), strict=True):
        assert rows[: out.size] == columns
