"""The wheel holds everything, and a user's own `sharding.py` beside their script does not get in its way."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["jdsi", "converters", "pallas_kernels", "sharding", "pyproject.toml", "README.md", "LICENSE"]


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the working tree, built without network from a copy: `build/lib` here may hold deleted modules."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", built, source)
    (path,) = built.glob("jdsi-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel)
    return target


def test_wheel_holds_the_sources_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"jdsi/py.typed", "jdsi/pallas_kernels/tuning.json"}
    for folder in SOURCES[:4]:
        prefix = "" if folder == "jdsi" else "jdsi/"
        expected |= {prefix + path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
    assert names == expected


def test_metadata_has_the_licence_and_the_command(installed: Path) -> None:
    (distribution,) = importlib.metadata.distributions(name="jdsi", path=[str(installed)])
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    licence = distribution.locate_file(next(f for f in distribution.files or [] if f.name == "LICENSE"))
    assert "Apache License" in Path(str(licence)).read_text("utf-8")
    (command,) = (point for point in distribution.entry_points if point.group == "console_scripts")
    assert (command.name, command.value) == ("jdsi", "jdsi.cli:main")


def test_import_beside_files_of_the_same_names(installed: Path, tmp_path: Path) -> None:
    for name in ("sharding", "converters", "pallas_kernels"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('the user\\'s own {name}.py was imported')\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "import jdsi, jdsi.sharding, jdsi.converters, jdsi.pallas_kernels\n"
        "modules = (jdsi, jdsi.sharding, jdsi.converters, jdsi.pallas_kernels)\n"
        "print(json.dumps([sys.path, [m.__file__ for m in modules]]))\n"
    )
    # -S leaves out the .pth files, and with them the editable install; the dependencies come by PYTHONPATH.
    dependencies = sysconfig.get_path("purelib")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), dependencies])}
    done = subprocess.run(
        [sys.executable, "-S", script], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    path, files = json.loads(done.stdout.splitlines()[-1])
    assert path[0] == str(tmp_path), "the user's folder must come first for this test to mean anything"
    assert [Path(file).relative_to(installed).as_posix() for file in files] == [
        "jdsi/__init__.py",
        "jdsi/sharding/__init__.py",
        "jdsi/converters/__init__.py",
        "jdsi/pallas_kernels/__init__.py",
    ]
