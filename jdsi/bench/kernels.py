"""The operators' speed: every implementation in turn, beside the limits of the device."""

import collections
import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax

from jdsi.errors import ConfigError, nearest
from jdsi.pallas_kernels import registry
from jdsi.pallas_kernels.device import Device, current_device
from jdsi.pallas_kernels.operator import IMPLEMENTATIONS, ArgumentSpec, Operator

from .contest import Function, Outcome, contest, footprint, reason
from .device_limits import DeviceLimits
from .kernel_peers import PEERS
from .report import Report, ratio_text, spread, warn, warn_if_busy
from .rounds import Ratio

_NOTES = (
    "All contenders took turns in the same rounds; a ratio is the median of the rounds' ratios (smallest to largest).",
    "time: of one call among many in one compiled program, each on operands of its own.",
    "limit: the least traffic (operands read once, results written once) at the rate of a device copy, or the"
    " arithmetic at the rate of one large matrix product, whichever takes longer.",
    "A share above 1 is possible: reading alone can be faster than copying, and small operands stay in the cache.",
    "error: the larger of the relative norm of the difference from XLA's result and the largest difference over the"
    " largest value.",
)
_CPU_BYTES = 2**28
_CPU_FLOPS = 2e9  # so that no call takes more than seconds


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
        beside = limits.contenders()
        for i, (operator, spec) in enumerate(cases):
            result = {"operator": operator.name, "arguments": spec.name, "bytes": spec.bytes, "flops": spec.flops}
            try:
                if why := too_large(operator, spec, device, max_bytes):
                    results.append(result | {"skipped": why})
                    continue
                warn(f"kernels: {operator.name}, {spec.name} ({i + 1} of {len(cases)})")
                reference = partial(operator.reference, **spec.static)
                contenders, left_out = _contenders(operator, spec, device, implementations, reference)
                outcome = contest(spec, reference, contenders, rounds=rounds, max_bytes=max_bytes, beside=beside)
                results.append(result | _figures(spec, outcome, limits) | {"left_out": left_out | outcome.left_out})
            except Exception as error:  # the next one may do better
                results.append(result | {"failed": reason(error)})
    except KeyboardInterrupt:
        settings["interrupted"] = True
    return Report("kernels", settings, results, _table(results), (*_NOTES, *_left_out(results)))


def check_implementations(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises `ConfigError` for a name that is not among `known`."""
    for name in names:
        if name not in known:
            raise ConfigError(f"implementation {name!r} is not known{nearest(name, known)}; known: {', '.join(known)}")


def memory_budget(device: Device) -> int:
    """Bytes that the operands and results of one measurement may take."""
    if device.platform == "cpu":
        return _CPU_BYTES
    stats = jax.local_devices()[0].memory_stats() or {}
    # The rest is for what the references hold for a while, and for the arrays of the limits.
    return stats.get("bytes_limit", 2**33) * 2 // 5


def too_large(operator: Operator, spec: ArgumentSpec, device: Device, max_bytes: int) -> str | None:
    """Why the arguments are skipped, or `None`."""
    if footprint(spec, partial(operator.reference, **spec.static)) > max_bytes:
        return f"takes more than the {max_bytes / 1e6:.0f} MB allowed"
    if device.platform == "cpu" and spec.flops > _CPU_FLOPS:
        return f"more than {_CPU_FLOPS / 1e9:.0f} GFLOP take too long on a CPU"
    return None


def _contenders(
    operator: Operator, spec: ArgumentSpec, device: Device, implementations: Sequence[str], reference: Function
) -> tuple[dict[str, Function], dict[str, str]]:
    """Those asked for that take the arguments, and why the others do not."""
    offered = PEERS.get(operator.name, {})
    contenders: dict[str, Function] = {}
    left_out: dict[str, str] = {}
    for name in implementations or (*operator.implementations, *offered):
        if name == "xla":
            contenders[name] = reference
        elif name in offered and device.platform != "cuda":
            left_out[name] = f"it needs an NVIDIA GPU, not {device.kind}"
        elif name in offered:
            contenders[name] = partial(offered[name], **spec.static)
        elif name not in operator.kernels:
            left_out[name] = "there is none"
        elif why := operator.why_not(name, *spec.abstract(), device=device, **spec.static):
            left_out[name] = why
        else:
            contenders[name] = partial(operator, implementation=name, **spec.static)
    return contenders, left_out


def _figures(spec: ArgumentSpec, outcome: Outcome, limits: DeviceLimits) -> dict[str, Any]:
    bandwidths, rates = limits.bandwidths(outcome.seconds["copy"]), limits.rates(outcome.seconds["matmul"])
    moving, computing = [spec.bytes / b for b in bandwidths], [spec.flops / r for r in rates]
    least = list(map(max, moving, computing))
    contenders = {}
    for name, error in outcome.errors.items():
        if (seconds := outcome.seconds.get(name)) is None:
            continue
        contenders[name] = {
            "microseconds": spread([s * 1e6 for s in seconds]),
            "gigabytes_per_second": spread([spec.bytes / s / 1e9 for s in seconds]),
            "teraflops_per_second": spread([spec.flops / s / 1e12 for s in seconds]),
            "share_of_limit": Ratio.of(least, seconds),
            "speed_over_xla": Ratio.of(outcome.seconds["xla"], seconds) if "xla" in outcome.seconds else None,
            "error": error,
        }
    return {
        "calls": outcome.calls,
        "bound": "memory" if statistics.median(moving) >= statistics.median(computing) else "arithmetic",
        "copy_gigabytes_per_second": spread([b / 1e9 for b in bandwidths]),
        "matmul_teraflops_per_second": spread([r / 1e12 for r in rates]),
        "contenders": contenders,
    }


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
