"""Every operator is registered, with arguments that are what they say."""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import pytest

import jdsi.pallas_kernels
from jdsi.pallas_kernels import registry
from jdsi.pallas_kernels.device import H200
from jdsi.pallas_kernels.operator import ArgumentSpec, Operator


def test_every_operator_there_is_is_registered() -> None:
    found = {}
    for module in pkgutil.walk_packages(jdsi.pallas_kernels.__path__, "jdsi.pallas_kernels."):
        if module.name.endswith(".api"):
            members = vars(importlib.import_module(module.name)).values()
            found |= {member.name: member for member in members if isinstance(member, Operator)}
    assert {name: entry.operator for name, entry in registry.operators().items()} == found


def some(specs: Sequence[ArgumentSpec]) -> Sequence[ArgumentSpec]:
    """About ten, from the first to the last."""
    return [*specs[:: max(1, len(specs) // 10)], specs[-1]]


@pytest.mark.parametrize("name", registry.NAMES)
def test_arguments_are_what_the_operator_takes(name: str) -> None:
    entry = registry.operators()[name]
    specs = entry.argument_specs()
    assert len({spec.name for spec in specs}) == len(specs) > 0
    for spec in some(specs):
        arrays = spec.abstract()
        results = jax.eval_shape(lambda *a, s=spec: entry.operator.reference(*a, **s.static), *arrays)
        assert spec.bytes > 0
        assert spec.flops >= 0
        assert isinstance(entry.operator.bucket(*arrays, **spec.static), str)
        updated = [(arrays[i].shape, arrays[i].dtype) for i in spec.in_place]
        there = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(results)]
        assert all(updated.count(one) <= there.count(one) for one in updated), spec.name


@pytest.mark.parametrize("name", registry.NAMES)
def test_kernels_take_some_arguments_and_offer_configurations(name: str) -> None:
    """A configuration is a mapping that JSON can hold, for it is what the tuning table remembers."""
    entry = registry.operators()[name]
    for kernel in entry.operator.kernels:
        taken = [
            spec
            for spec in some(entry.argument_specs())
            if entry.operator.why_not(kernel, *spec.abstract(), device=H200, **spec.static) is None
        ]
        assert taken, f"{kernel} takes none of the arguments"
        for spec in taken:
            candidates = entry.operator.module(kernel).candidates(*spec.abstract(), device=H200, **spec.static)
            for config in candidates:
                assert json.loads(json.dumps(dict(config))) == dict(config), spec.name
                assert all(isinstance(value, int | str | None) for value in config.values())


def test_memory_that_is_written_is_named_as_such() -> None:
    """Or the benchmark would time the copy of whole caches."""
    for spec in registry.operators()["rotary_kv_write"].argument_specs():
        assert [spec.abstract()[i].ndim for i in spec.in_place] == [4, 4]


def test_the_documentation_lists_every_operator_and_its_example_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    listed = {row[0].strip("`"): row[3] for row in rows}
    there = {name: ", ".join(entry.operator.kernels) for name, entry in registry.operators().items()}
    assert listed == there
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found: dict[str, jax.Array] = {}
    exec(code, found)
    assert found["y"].shape == (4, 512)
    assert found["out"].shape == (2, 1, 8, 64)


def test_the_package_alone_imports_no_operator() -> None:
    code = "import sys, jdsi.pallas_kernels.registry; print([n for n in sys.modules if n.endswith('.specs')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"
