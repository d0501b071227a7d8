"""Collectives read from the text of compiled programs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import planning_cases
from jdsi.planning import Collective, collectives_of
from jdsi.sharding.topology import Topology

MESH = planning_cases.MESH


def program(*lines: str, header: str = "HloModule m, num_partitions=8") -> str:
    """HLO whose entry has the given instructions."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"{header}\n\nENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def one(line: str, mesh: dict[str, int] | None = None) -> Collective:
    (found,) = collectives_of(program(line), MESH if mesh is None else mesh)
    return found


def check(text: str) -> None:
    """That the text of `planning_cases.program_text` holds what was written."""
    found = {(c.kind, c.axis, c.group_size, c.shape, c.per_trip): c for c in collectives_of(text, MESH)}
    # XLA combines the two sums as a tuple, or lays them end to end first.
    sums = [c for key, c in found.items() if key[:3] == ("all-reduce", "tensor", 4)]
    assert [(c.bytes, c.count) for c in sums] == [(2 * 8 * 128 * 4, 1)]
    others = {key: (c.bytes, c.count) for key, c in found.items() if c not in sums and c.kind != "all-to-all"}
    assert others == {
        ("all-gather", "tensor", 4, (8, 512), False): (8 * 512 * 4, 1),
        ("reduce-scatter", "tensor", 4, (8, 512), False): (8 * 512 * 4, 1),
        ("collective-permute", "data", 2, (8, 128), False): (8 * 128 * 4, 1),
        ("all-reduce", "data+tensor", 8, (), False): (4, 1),
        ("all-reduce", "data", 2, (8, 128), True): (8 * 128 * 4, 1),
    }
    (exchange,) = [c for c in found.values() if c.kind == "all-to-all"]
    assert (exchange.axis, exchange.group_size, exchange.bytes, exchange.arrays) == ("tensor", 4, 8 * 128 * 4, 1)


def test_a_program_compiled_for_virtual_devices() -> None:
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    script = str(Path(planning_cases.__file__))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    check(done.stdout)


@pytest.mark.aot
@pytest.mark.parametrize("name", ["h200:8", "a100:8"])
def test_a_program_compiled_for_gpus(name: str) -> None:
    text = planning_cases.program_text(Topology.parse(name).devices())
    assert "-start(" in text
    check(text)


REDUCE = "use_global_device_ids=true, to_apply=%add"


@pytest.mark.parametrize(
    ("groups", "axis", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", "tensor", 4),
        ("{{4,5,6,7},{3,2,1,0}}", "tensor", 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", "data", 2),
        ("{{0,1,2,3,4,5,6,7}}", "data+tensor", 8),
        ("{}", "data+tensor", 8),
        ("{{0,1},{2,3},{4,5},{6,7}}", None, 2),
        ("[2,4]<=[8]", "tensor", 4),
        ("[4,2]<=[2,4]T(1,0)", "data", 2),
        ("[1,8]<=[8]", "data+tensor", 8),
        ("[4,2]<=[8]", None, 2),
        ("mesh['data'=2,'expert'=1,'tensor'=4] {'tensor'}", "tensor", 4),
        ("mesh['a'=2,'b'=4] {'a'}", "data", 2),
        ("mesh['a'=2,'b'=4] {'a','b'}", "data+tensor", 8),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", "tensor", 4),
        ("mesh['a'=2,'b'=2], device_ids=(0,4,1,5) {'a'}", None, 2),
    ],
)
def test_replica_groups_in_all_notations(groups: str, axis: str | None, size: int) -> None:
    found = one(f"%r = f32[3,5]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}, {REDUCE}")
    assert found == Collective("all-reduce", "f32", (3, 5), 60, size, axis)


def test_groups_have_no_axis_without_a_mesh() -> None:
    line = f"%r = bf16[6] all-reduce(%x), replica_groups=[2,4]<=[8], {REDUCE}"
    assert one(line, {}) == Collective("all-reduce", "bf16", (6,), 12, 4, None)


def test_three_axes() -> None:
    mesh = {"pipe": 2, "data": 2, "tensor": 2}
    groups = {
        "pipe": "{{0,4},{1,5},{2,6},{3,7}}",
        "pipe+tensor": "{{0,1,4,5},{2,3,6,7}}",
        "data": "[4,2]<=[2,2,2]T(0,2,1)",
    }
    for axis, written in groups.items():
        assert one(f"%r = f32[2] all-reduce(%x), replica_groups={written}, {REDUCE}", mesh).axis == axis


@pytest.mark.parametrize(
    ("line", "kind", "shape", "size", "arrays"),
    [
        ("%s = f32[8]{0} all-reduce-start(%x)", "all-reduce", (8,), 32, 1),
        ("%s = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%x)", "all-reduce", (8,), 32, 1),
        ("%s = (f32[8]{0}, bf16[4]{0}) all-reduce-start(%x, %y)", "all-reduce", (8,), 40, 2),
        ("%s = ((f32[8], bf16[4]), (f32[8], bf16[4])) all-reduce-start(%x, %y)", "all-reduce", (8,), 40, 2),
        ("%s = (f32[8]{0}, /*index=1*/f32[4]{0}) all-reduce(%x, %y)", "all-reduce", (8,), 48, 2),
        ("%s = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), dimensions={0}", "all-gather", (8,), 32, 1),
        ("%s = f32[3,2]{1,0} reduce-scatter(%x), dimensions={1}", "reduce-scatter", (3, 8), 96, 1),
        ("ROOT %s = pred[6]{0:T(256)} all-reduce(%x)", "all-reduce", (6,), 6, 1),
        ("%s = s4[3] all-gather(%x), dimensions={0}", "all-gather", (3,), 2, 1),
        ("%s = f8e4m3fn[3] all-gather(%x), dimensions={0}", "all-gather", (3,), 3, 1),
        ("%s = (f32[2], f32[2], f32[2], f32[2]) all-to-all(%a, %b, %c, %d)", "all-to-all", (4, 2), 32, 1),
    ],
)
def test_types_of_results(line: str, kind: str, shape: tuple[int, ...], size: int, arrays: int) -> None:
    found = one(f"{line}, replica_groups=[2,4]<=[8]")
    assert (found.kind, found.shape, found.bytes, found.arrays) == (kind, shape, size, arrays)


@pytest.mark.parametrize(
    ("pairs", "size", "axis"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", 2, "data"),
        ("{{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}", 4, "tensor"),
        ("{{0,1},{1,2},{4,5},{3,3}}", 3, "tensor"),
        ("{{0,5}}", 2, "data+tensor"),
    ],
)
def test_permutes(pairs: str, size: int, axis: str) -> None:
    for line in (
        "%p = f32[4]{0} collective-permute(%x)",
        "%p = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x)",
    ):
        found = one(f"{line}, channel_id=1, source_target_pairs={pairs}")
        assert found == Collective("collective-permute", "f32", (4,), 16, size, axis)


def test_exchanges_within_one_device_are_left_out() -> None:
    lines = (
        "%a = f32[4] all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add",
        "%b = f32[4] collective-permute(%a), source_target_pairs={{0,0},{1,1}}",
    )
    assert collectives_of(program(*lines), MESH) == []


CALLS = """HloModule m, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%reduce (p: f32[4]) -> f32[4] {
  ROOT %r = f32[4]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
}

%never (p: f32[4]) -> f32[4] {
  ROOT %r = f32[4]{0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}
}

%scatter (p: f32[8]) -> f32[2] {
  ROOT %r = f32[2]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

%condition (p: f32[4]) -> pred[] {
  ROOT %c = pred[] constant(true)
}

%body (p: f32[4]) -> f32[4] {
  ROOT %c = f32[4]{0} call(%p), to_apply=%reduce
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %c1 = f32[4]{0} call(%x), to_apply=%reduce
  %c2 = f32[4]{0} call(%c1), to_apply=%reduce
  %start = ((f32[8]{0}), f32[2]{0}) async-start(%c2), calls=%scatter
  %done = f32[2]{0} async-done(%start), calls=%scatter
  %w = f32[4]{0} while(%c2), condition=%condition, body=%body, metadata={op_name="all-reduce"}
  %s = f32[4]{0} all-reduce-start(%w), replica_groups=[2,4]<=[8], to_apply=%add
  %d = f32[4]{0} all-reduce-done(%s)
  ROOT %b = f32[4]{0} conditional(%p, %d, %d), branch_computations={%reduce, %condition}
}
"""


def test_computations_count_as_often_as_they_are_called() -> None:
    assert collectives_of(CALLS, MESH) == [
        Collective("all-reduce", "f32", (4,), 16, 4, "tensor", count=4),
        Collective("reduce-scatter", "f32", (8,), 32, 4, "tensor"),
        Collective("all-reduce", "f32", (4,), 16, 4, "tensor", per_trip=True),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "entry"),
        (program("%r = f32[4] all-reduce(%x), replica_groups=@somewhere, to_apply=%add"), "unknown way"),
        (program("%r = f32[4] all-reduce(%x), replica_groups=mesh['a'=8] {'a':(1)2}, to_apply=%add"), "parts of axes"),
        (program("%r = f32[4] collective-permute(%x)"), "pairs"),
        (program("%r = zz[4] all-reduce(%x), replica_groups=[1,8]<=[8]"), "dtype"),
    ],
)
def test_what_cannot_be_read_raises(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collectives_of(text, MESH)
