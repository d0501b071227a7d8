"""The operators' speed: every implementation in turn, beside the limits of the device."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from jdsi.errors import ConfigError, nearest
from jdsi.pallas_kernels import registry
from jdsi.pallas_kernels.device import current_device
from jdsi.pallas_kernels.operator import IMPLEMENTATIONS, ArgumentSpec, Operator

from .device_limits import DeviceLimits
from .kernel_peers import PEERS
from .kernel_results import Measuring, memory_budget
from .report import Report, ratio_text, warn, warn_if_busy

_NOTES = (
    "All contenders took turns in the same rounds; a ratio is the median of the rounds' ratios (smallest to largest).",
    "time: of one call among many in one compiled program, each on operands of its own.",
    "limit: the least traffic (operands read once, results written once) at the rate of a device copy, or the"
    " arithmetic at the rate of one large matrix product, whichever takes longer.",
    "A share above 1 is possible: reading alone can be faster than copying, and small operands stay in the cache.",
    "error: the larger of the relative norm of the difference from XLA's result and the largest difference over the"
    " largest value.",
)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which arguments of which operators are asked for.

    Attributes:
        operators: names; all if empty.
        match: what the name of an argument spec contains.
        dtype: of one of the arrays.

    Raises:
        ConfigError: an unknown operator.
    """

    operators: Sequence[str] = ()
    match: str = ""
    dtype: str | None = None

    def __iter__(self) -> Iterator[tuple[Operator, ArgumentSpec]]:
        """Raises `ConfigError` if an operator is unknown or nothing is left."""
        known = registry.operators()
        for name in self.operators:
            if name not in known:
                raise ConfigError(f"operator {name!r} is not known{nearest(name, known)}; known are {', '.join(known)}")
        found = [
            (entry.operator, spec)
            for name, entry in known.items()
            if not self.operators or name in self.operators
            for spec in entry.argument_specs()
            if self.match in spec.name and self._has_dtype(spec)
        ]
        if not found:
            raise ConfigError(f"no arguments match {self.match!r} in {self.dtype or 'any dtype'}")
        return iter(found)

    def _has_dtype(self, spec: ArgumentSpec) -> bool:
        return self.dtype is None or any(leaf.dtype.name == self.dtype for leaf in jax.tree.leaves(spec.abstract()))


def bench_kernels(
    selection: Selection | None = None,
    *,
    implementations: Sequence[str] = (),
    rounds: int = 5,
    max_bytes: int | None = None,
) -> Report:
    """Time, bytes and floating-point operations per second of every implementation, beside the limits of this device.

    What fails is reported with its reason and the rest goes on. Ctrl-C ends the run; the report then holds what was
    measured so far and says `interrupted` in its settings.

    Args:
        selection: by default all arguments of all operators.
        implementations: names of those to time, `"cudnn"` for the peer; by default all there are. XLA's is always run
            once, for the others' results are compared with it.
        rounds: of measuring.
        max_bytes: arguments that take more are skipped; by default two fifths of a GPU's memory, 256 MB on
            a CPU.

    Raises:
        ConfigError: a number is not positive, an operator or an implementation is unknown, or nothing is selected.
    """
    device = current_device()
    max_bytes = memory_budget(device) if max_bytes is None else max_bytes
    if min(rounds, max_bytes) < 1:
        raise ConfigError(f"{rounds=} and {max_bytes=} must be positive")
    check_implementations(implementations, (*IMPLEMENTATIONS, *(name for names in PEERS.values() for name in names)))
    cases = list(selection or Selection())
    warn_if_busy()
    limits = DeviceLimits.of(device.platform)
    settings: dict[str, Any] = {
        "device": dataclasses.asdict(device),
        "implementations": list(implementations),
        "rounds": rounds,
        "max_bytes": max_bytes,
        "limits": dataclasses.asdict(limits),
        "interrupted": False,
    }
    results: list[dict[str, Any]] = []
    try:
        measuring = Measuring(device, limits, rounds=rounds, max_bytes=max_bytes, implementations=implementations)
        for i, case in enumerate(cases):
            warn(f"kernels: {case[0].name}, {case[1].name} ({i + 1} of {len(cases)})")
            results += measuring.results([case])
    except KeyboardInterrupt:
        settings["interrupted"] = True
    return Report("kernels", settings, results, _table(results), (*_NOTES, *_left_out(results)))


def check_implementations(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises `ConfigError` for a name that is not among `known`."""
    for name in names:
        if name not in known:
            raise ConfigError(f"implementation {name!r} is not known{nearest(name, known)}; known: {', '.join(known)}")


def _table(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    head = ["operator", "arguments", "by", "time", "GB/s", "TFLOP/s", "share of the limit", "speed over XLA", "error"]
    rows = [head]
    for result in results:
        for name, entry in result.get("contenders", {}).items():
            rows.append(
                [
                    result["operator"],
                    result["arguments"],
                    name,
                    f"{entry['microseconds']['median']:.1f} us",
                    f"{entry['gigabytes_per_second']['median']:.3g}",
                    f"{entry['teraflops_per_second']['median']:.3g}",
                    f"{result['bound']} {ratio_text(entry['share_of_limit'])}",
                    "" if name == "xla" else ratio_text(entry["speed_over_xla"]),
                    "" if name == "xla" else f"{entry['error']:.1e}",
                ]
            )
    return rows


def _left_out(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each reason, with the first arguments it holds for."""
    lines: dict[tuple[str, str, str], list[str]] = collections.defaultdict(list)
    measured = collections.Counter(result["operator"] for result in results if "left_out" in result)
    for result in results:
        for who, why in result.get("left_out", {}).items():
            lines[result["operator"], who, why].append(result["arguments"])
        for what in ("skipped", "failed"):
            if what in result:
                lines[result["operator"], what, result[what]].append(result["arguments"])

    def arguments(operator: str, who: str, found: Sequence[str]) -> str:
        every = who not in ("skipped", "failed") and len(found) == measured[operator]
        rest = [f"and {len(found) - 3} more"] if len(found) > 4 else []
        return "all measured" if every else ", ".join([*found[: 3 if rest else 4], *rest])

    return [f"{name}, {who}: {why} ({arguments(name, who, found)})" for (name, who, why), found in lines.items()]
