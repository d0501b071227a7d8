"""The text the tiny Python model is trained on: the standard library of the running Python, split by file."""

import dataclasses
import hashlib
import json
import re
import sysconfig
from pathlib import Path
from typing import Any

# Installed packages, tests (a slim install has none), generated tables, and parts that some distributions leave out.
SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "ensurepip"}
    | {"idlelib", "lib2to3", "turtledemo"}
)
HELD_OUT_PERCENT = 4


@dataclasses.dataclass(frozen=True)
class Document:
    """One source file.

    Attributes:
        name: path relative to the library's folder, with forward slashes.
        text: its contents, decoded as UTF-8.
    """

    name: str
    text: str


def is_held_out(name: str) -> bool:
    """Whether the file of this relative name is kept out of training; depends on nothing but the name."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def read_corpus(folder: Path | None = None) -> tuple[list[Document], list[Document]]:
    """Training and held-out files, in the order of their names.

    Args:
        folder: where to look for `*.py`; the running Python's standard library if `None`.

    Returns:
        `(training, held out)`. Files that are empty or not UTF-8 are in neither.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    training: list[Document] = []
    held_out: list[Document] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED.intersection(parts[:-1]) or parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        name = "/".join(parts)
        if text.strip():
            (held_out if is_held_out(name) else training).append(Document(name, text))
    return training, held_out


def to_json(record: dict[str, Any]) -> str:
    """`record` for reading: indented, but the innermost lists on one line each."""
    text = json.dumps(record, indent=1)
    return re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda m: "[" + re.sub(r"\s*\n\s*", " ", m[1]) + "]", text) + "\n"
