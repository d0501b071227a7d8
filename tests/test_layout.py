"""The layout that pyproject.toml declares is the layout on disk, and no module imports from a floor above its own."""

import ast
import graphlib
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "jdsi": "jdsi",
    "jdsi.converters": "converters",
    "jdsi.pallas_kernels": "pallas_kernels",
    "jdsi.sharding": "sharding",
}

FLOORS = {
    "jdsi.cli": 7,
    "jdsi.bench": 7,
    "jdsi": 6,  # the public API: `from jdsi import ...` is for the floor above; what it gathers is not held against it
    "jdsi._public": 6,
    "jdsi.engine": 6,
    "jdsi.inference": 6,
    "jdsi.serving": 6,
    "jdsi.training": 6,
    "jdsi.profiler": 6,
    "jdsi.runtime": 5,
    "jdsi.scheduling": 5,
    "jdsi.generation": 5,
    "jdsi.config": 5,
    "jdsi.planning": 5,
    "jdsi.deepspeed": 5,
    "jdsi.converters": 4,
    "jdsi.models": 3,
    "jdsi.layers": 2,
    "jdsi.kv_cache": 2,
    "jdsi.quantization": 2,
    "jdsi.pallas_kernels": 1,
    "jdsi.sharding": 1,
    "jdsi.cuda_compiler": 0,
    "jdsi.errors": 0,
    "jdsi.without_torch": 0,
}
# On these floors one package may import another; import cycles stay forbidden.
SHARED_FLOORS = {5, 6, 7}
# The bottom packages are useful on their own, so they need no more than this.
BOTTOM_LIBRARIES = {"jax", "jax_triton", "jaxtyping", "numpy", "triton"}


def modules_on_disk() -> dict[str, Path]:
    """Every module of the package, by the name it is imported under."""
    modules = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            modules[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return modules


def group_of(module: str) -> str | None:
    """The entry of `FLOORS` that `module` belongs to; the root's entry holds for the root only."""
    if module == "jdsi":
        return module
    return next((group for group in FLOORS if group != "jdsi" and f"{module}.".startswith(f"{group}.")), None)


def imports_of(name: str, source: str, *, is_package: bool, known: Set[str]) -> Iterator[str]:
    """What the module `name` imports anywhere in its text, inside functions and under TYPE_CHECKING included.

    `from package import thing` yields `package.thing` where that is a module in `known`, and `package` otherwise.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                anchor = parts[: len(parts) - node.level + is_package]
                base = ".".join([*anchor, *([base] if base else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield submodule if submodule in known else base


def violations(name: str, imported: Iterator[str] | list[str], known: Set[str]) -> list[str]:
    """Why `name` may not import what it imports, one line each."""
    group = group_of(name)
    if group is None:
        return [f"{name} is on no floor: give its package one in FLOORS, in tests/test_layout.py"]
    found = []
    for target in imported:
        library = target.split(".")[0]
        if library != "jdsi":
            if FLOORS[group] == 1 and library not in BOTTOM_LIBRARIES | sys.stdlib_module_names:
                found.append(f"{name} imports {library}; its floor may import {', '.join(sorted(BOTTOM_LIBRARIES))}")
            continue
        if target not in known:
            found.append(f"{name} imports {target}, which does not exist")
            continue
        other = group_of(target)
        if other is None or other == group or group == "jdsi":
            continue
        shared = FLOORS[other] == FLOORS[group] and FLOORS[group] in SHARED_FLOORS and other != "jdsi"
        if FLOORS[other] >= FLOORS[group] and not shared:
            found.append(f"{name} (floor {FLOORS[group]}) imports {target} (floor {FLOORS[other]})")
    return found


def cycle(graph: Mapping[str, Set[str]]) -> list[str]:
    """One import cycle, or nothing."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def read_imports(modules: Mapping[str, Path]) -> dict[str, list[str]]:
    return {
        name: list(
            imports_of(name, path.read_text("utf-8"), is_package=path.name == "__init__.py", known=frozenset(modules))
        )
        for name, path in modules.items()
    }


def test_pyproject_lists_every_package() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    assert setuptools["package-dir"] == FOLDERS
    on_disk = {name for name, path in modules_on_disk().items() if path.name == "__init__.py"}
    listed = setuptools["packages"]
    assert sorted(listed) == sorted(set(listed)), "a package is listed twice"
    assert not on_disk - set(listed), "add these to [tool.setuptools] packages"
    assert not set(listed) - on_disk, "these are in [tool.setuptools] packages but not on disk"


def test_every_module_is_in_a_package() -> None:
    """A folder without an `__init__.py` would be left out of the wheel."""
    bare = {path.parent for path in modules_on_disk().values() if not (path.parent / "__init__.py").exists()}
    assert not bare


def test_modules_import_from_lower_floors_only() -> None:
    modules = modules_on_disk()
    found = [
        line for name, imported in read_imports(modules).items() for line in violations(name, imported, modules.keys())
    ]
    assert not found, "\n".join(found)


def test_no_import_cycles() -> None:
    modules = modules_on_disk()
    graph = {name: {target for target in found if target in modules} for name, found in read_imports(modules).items()}
    assert not cycle(graph)


KNOWN = frozenset({"jdsi", *FLOORS, "jdsi.layers.linear", "jdsi.models.families", "jdsi.models.spec"})


@pytest.mark.parametrize(
    ("name", "is_package", "source", "expected"),
    [
        ("jdsi.layers.linear", False, "from jdsi import models", "floor 3"),
        ("jdsi.layers.linear", False, "from ..models.spec import MlpSpec", "floor 3"),
        ("jdsi.layers", True, "from ..models import spec", "floor 3"),
        ("jdsi.layers.linear", False, "def f():\n    import jdsi.engine", "floor 6"),
        ("jdsi.layers.linear", False, "from jdsi import load", "floor 6"),
        ("jdsi.engine", False, "import jdsi", "floor 6"),
        ("jdsi.layers.linear", False, "if TYPE_CHECKING:\n    from jdsi.kv_cache import Context", "floor 2"),
        ("jdsi.errors", False, "import jdsi.sharding", "floor 1"),
        ("jdsi.sharding", True, "import flax", "imports flax"),
        ("jdsi.sharding", True, "from jdsi.nowhere import x", "does not exist"),
        ("jdsi.unheard_of", False, "import os", "on no floor"),
    ],
)
def test_violations_are_caught(name: str, is_package: bool, source: str, expected: str) -> None:
    (line,) = violations(name, imports_of(name, source, is_package=is_package, known=KNOWN), KNOWN)
    assert expected in line


@pytest.mark.parametrize(
    ("name", "is_package", "source"),
    [
        ("jdsi.layers", True, "from .linear import Linear"),
        ("jdsi.layers.linear", False, "import flax\nfrom jdsi.errors import ConfigError\nfrom ..sharding import mesh"),
        ("jdsi.models.spec", False, "from .families import family_for"),
        ("jdsi.engine", False, "from jdsi.serving import serve"),
        ("jdsi.cli", True, "import jdsi\nimport jdsi.engine"),
        ("jdsi", True, "from .engine import Engine\nfrom jdsi.sharding import mesh"),
        ("jdsi.pallas_kernels", True, "import math\nimport jax.experimental.pallas\nfrom ..errors import ConfigError"),
    ],
)
def test_allowed_imports_pass(name: str, is_package: bool, source: str) -> None:
    assert not violations(name, imports_of(name, source, is_package=is_package, known=KNOWN), KNOWN)


def test_cycles_are_caught() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def run_python(code: str) -> dict:
    """What `code` prints as JSON, in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_test_imports_another() -> None:
    """What several need is in a module of its own, so that a test is run once and by its own name."""
    modules = {path.stem: path for path in (ROOT / "tests").rglob("*.py")}
    imports = read_imports(modules)
    assert not [(name, one) for name, found in imports.items() for one in found if one.startswith("test_")]


REPORT = """
import json, sys
import jax._src.xla_bridge
print(json.dumps({
    "backends": jax._src.xla_bridge.backends_are_initialized(),
    "loaded": sorted({"torch", "transformers"} & sys.modules.keys()),
}))
"""


def test_import_starts_no_backend_and_loads_nothing_heavy() -> None:
    """`import jdsi` must leave the choice of devices, and the seconds torch and transformers take, to the user."""
    assert run_python("import jdsi; jdsi.init_inference" + REPORT) == {"backends": False, "loaded": []}


def test_no_module_loads_torch_when_imported() -> None:
    """torch is an extra and transformers slow: the functions that need them import them."""
    names = sorted(modules_on_disk())
    load = f"""
import importlib
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # a module of an extra that is not installed here
        if error.name.partition(".")[0] == "jdsi":
            raise
"""
    assert run_python(load + REPORT) == {"backends": False, "loaded": []}
