"""As much of XLA's text form of a program as it takes to find instructions of some kinds and what they give.

Types and attributes are read line by line: compiled programs have tens of thousands of lines, and few of them matter.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping

Arrays = tuple[tuple[str, tuple[int, ...]], ...]
"""Dtype, by XLA's name, and shape of each."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction.

    Attributes:
        opcode: such as "all-reduce"; that of an asynchronous one ends in "-start".
        type: of the result.
        rest: operands and attributes.
    """

    opcode: str
    type: str
    rest: str

    @property
    def kind(self) -> str:
        """The opcode, whether asynchronous or not."""
        return self.opcode.removesuffix("-start")

    @property
    def result(self) -> Arrays:
        """What it gives; of one that only starts, what it gives in the end."""
        return arrays_of(_outcome(self) if self.opcode.endswith("-start") else self.type)


_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)


def instructions_of(text: str, kinds: Collection[str]) -> Iterator[tuple[Instruction, bool]]:
    """The instructions of `kinds` of the entry computation and of all that it calls, each as often as it is called.

    Yields:
        An instruction, and whether it is in the body of a loop, where it is given once.

    Raises:
        ValueError: there is no entry computation.
    """
    computations, entry = _computations(text, kinds)
    return _reached(computations, entry, kinds, in_loop=False)


def partitions_of(text: str) -> int:
    """On how many devices the program runs together."""
    header = text.split("\n", 1)[0]
    counts = [re.search(rf"\b{name}=(\d+)", header) for name in ("num_partitions", "replica_count")]
    return math.prod(int(count[1]) for count in counts if count)


def _computations(text: str, kinds: Collection[str]) -> tuple[dict[str, list[Instruction]], str]:
    """Of every computation the instructions of `kinds` and those that call others; and the entry's name."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = None, None
    for raw in text.splitlines():
        if header := re.match(r"(ENTRY\s+)?%?([\w.\-]+)\s*(\(.*)?\{$", raw):
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif raw.startswith("}"):
            lines = None
        elif lines is not None and (any(kind in raw for kind in kinds) or _CALLED.search(raw)):
            lines += _read(raw)
    if entry is None:
        raise ValueError("no entry computation: this is not the text of a compiled program")
    return computations, entry


def _read(raw: str) -> list[Instruction]:
    match = re.match(r"\s+(?:ROOT\s+)?%?[\w.\-]+ = (.*)", re.sub(r"/\*.*?\*/", "", raw))
    if match is None:
        return []
    text = match[1]
    end = _closing(text) + 1 if text.startswith("(") else text.find(" ")
    opcode = re.match(r"\s*([\w\-]+)\(", text[end:])
    return [] if opcode is None else [Instruction(opcode[1], text[:end], text[end + opcode.end() :])]


def _closing(text: str) -> int:
    """Where the parenthesis that `text` starts with is closed."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _reached(
    computations: Mapping[str, list[Instruction]], name: str, kinds: Collection[str], *, in_loop: bool
) -> Iterator[tuple[Instruction, bool]]:
    for line in computations.get(name, ()):
        if line.kind in kinds:
            yield line, in_loop
        # The end of an asynchronous call names its computation again.
        elif not line.opcode.endswith(("-done", "-update")):
            for names in _CALLED.findall(line.rest):
                for called in re.findall(r"[\w.\-]+", names):
                    yield from _reached(computations, called, kinds, in_loop=in_loop or line.opcode == "while")


def _outcome(line: Instruction) -> str:
    """The type of the result within that of a start, which may hold the operands and more besides."""
    if not line.type.startswith("("):
        return line.type
    parts = _elements(line.type)
    # An all-reduce was once started as the bare result, a tuple where several were combined.
    if len(parts) < 2 or (line.kind == "all-reduce" and not parts[0].startswith("(")):
        return line.type
    return parts[1]


def _elements(type: str) -> list[str]:
    """The parts of a tuple's type."""
    parts, depth, start = [], 0, 1
    for i, character in enumerate(type):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or (character == ")" and depth == 0):
            parts.append(type[start:i].strip())
            start = i + 1
    return parts


def arrays_of(type: str) -> Arrays:
    """Dtype and shape of every array in a type such as `(f32[8,128]{1,0}, s32[])`.

    Raises:
        ValueError: there is none.
    """
    found = re.findall(r"\b([a-z]\w*)\[([\d,<= ]*)\]", type)
    if not found:
        raise ValueError(f"no arrays in the type {type!r}")
    return tuple((dtype, tuple(int(n.strip(" <=")) for n in dims.split(",") if n.strip())) for dtype, dims in found)


_ITEM_BITS = {"pred": 8, "c64": 64, "c128": 128}


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array.

    Raises:
        ValueError: an unknown dtype.
    """
    digits = re.match(r"(?:bf|f|s|u)(\d+)", dtype)
    bits = _ITEM_BITS.get(dtype) or (int(digits[1]) if digits else None)
    if bits is None:
        raise ValueError(f"unknown dtype {dtype!r}")
    return -(-math.prod(shape) * bits // 8)
