"""What is measured of an operator with given arguments: every implementation in turn, and the device's limits."""

import concurrent.futures
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax

from jdsi.pallas_kernels.device import Device
from jdsi.pallas_kernels.operator import ArgumentSpec, Operator

from .contest import Contest, Function, Outcome, footprint, prepare, reason
from .device_limits import DeviceLimits
from .kernel_peers import PEERS
from .report import spread
from .rounds import Ratio

_CPU_BYTES = 2**28
_CPU_FLOPS = 2e9  # so that no call takes more than seconds

Case = tuple[Operator, ArgumentSpec]


class Measuring:
    """Measures operators on one device, beside its limits.

    Args:
        device: that kernels are chosen for.
        limits: what is measured beside them.
        rounds: figures for each contender.
        max_bytes: arguments that take more are skipped.
        implementations: names of those to time; by default all there are, peers included.
    """

    def __init__(
        self,
        device: Device,
        limits: DeviceLimits,
        *,
        rounds: int,
        max_bytes: int,
        implementations: Sequence[str] = (),
    ) -> None:
        self._device, self._limits, self._beside = device, limits, limits.contenders()
        self._rounds, self._max_bytes, self._implementations = rounds, max_bytes, implementations

    def results(self, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
        """A record for each case, in order: figures, or why there are none.

        `left_out` says why contenders have none; `faults` names those among them that failed, or were wrong.

        Several cases at a time are compiled side by side before the first of them is timed.
        """
        if len(cases) == 1:  # in this thread, which an interrupt reaches
            prepared: list[Callable[[], Any]] = [partial(self._prepare, *cases[0])]
        else:
            with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
                prepared = [pool.submit(self._prepare, *case).result for case in cases]
        for (operator, spec), get in zip(cases, prepared, strict=True):
            result = {"operator": operator.name, "arguments": spec.name, "bytes": spec.bytes, "flops": spec.flops}
            try:
                found, left_out = get()
                if isinstance(found, str):
                    yield result | {"skipped": found}
                    continue
                outcome = found.measure(self._rounds, self._beside)
                figures = _figures(spec, outcome, self._limits)
                yield result | figures | {"left_out": left_out | outcome.left_out, "faults": list(outcome.left_out)}
            except Exception as error:  # the next one may do better
                yield result | {"failed": reason(error)}

    def _prepare(self, operator: Operator, spec: ArgumentSpec) -> tuple[Contest | str, dict[str, str]]:
        """The contest, or why there is none; and why contenders are not in it."""
        if why := too_large(operator, spec, self._device, self._max_bytes):
            return why, {}
        reference = partial(operator.reference, **spec.static)
        contenders, left_out = _contenders(operator, spec, self._device, self._implementations, reference)
        return prepare(spec, reference, contenders, self._max_bytes), left_out


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
