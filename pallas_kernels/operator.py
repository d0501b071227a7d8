"""The contract of every operator: one reference, any number of kernels, one choice among them."""

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol, cast, get_args

import jax

from jdsi.errors import ConfigError, UnsupportedError, nearest

from . import tuning
from .device import Device, current_device, has_target
from .varying import vary_like

Implementation = Literal["xla", "pallas", "triton"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)
Arrays = tuple[Any, ...]  # pytrees of arrays, `None` for those left out
Config = Mapping[str, Any]


class KernelModule(Protocol):
    """What the module of a kernel defines. `arrays` and `static` are those of the operator's reference.

    It may also define `rather_xla`, which takes what `why_not` takes: why the reference is expected to be as fast for
    arguments that the kernel takes, or `None`. Only what has neither been named nor tuned heeds it.
    """

    @staticmethod
    def why_not(*arrays: Any, device: Device, **static: Any) -> str | None:
        """Why the kernel cannot take these arguments on `device`, or `None`; looks at shapes and dtypes only."""
        ...

    @staticmethod
    def run(*arrays: Any, device: Device, config: Config | None, **static: Any) -> Any:
        """What the reference returns; `config` holds tile sizes and the like, by default the kernel's own choice."""
        ...

    @staticmethod
    def candidates(*arrays: Any, device: Device, **static: Any) -> Sequence[Config]:
        """The configurations worth timing for these arguments."""
        ...


_default = jax.make_user_context(None)


@contextlib.contextmanager
def default_implementation(name: Implementation | None) -> Iterator[None]:
    """What operators called without an implementation run: `None` leaves the choice to each.

    "xla" is the one to name where arrays are sharded under plain `jax.jit`: XLA cannot split a kernel, so it would
    gather whole weights for it. Inside `jax.shard_map` kernels see their own shard and need no such care. Jitted
    functions remember it.

    Raises:
        ConfigError: an unknown name.
    """
    if name is not None and name not in IMPLEMENTATIONS:
        raise ConfigError(
            f"unknown implementation {name!r}{nearest(str(name), IMPLEMENTATIONS)}; known: {', '.join(IMPLEMENTATIONS)}"
        )
    with _default(name):
        yield


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator: what it computes, and the kernels that compute it.

    Calling it runs the implementation asked for, or the fastest known one that takes the arguments.

    Attributes:
        name: also the key of the tuning table.
        reference: the plain JAX form, which every device runs and every derivative uses.
        bucket: arguments that share a key share a tuning; takes what the reference takes.
        kernels: names of the other implementations, the first that takes the arguments is preferred; each is the
            module `package.name`, imported when it is first asked about.
        package: the package whose modules the kernels are.
    """

    name: str
    package: str
    reference: Callable[..., Any]
    bucket: Callable[..., str]
    kernels: tuple[Implementation, ...] = ("pallas",)

    @property
    def implementations(self) -> tuple[Implementation, ...]:
        """All that can be named."""
        return ("xla", *self.kernels)

    def module(self, kernel: Implementation) -> KernelModule:
        """The module of one kernel."""
        return cast(KernelModule, importlib.import_module(f"{self.package}.{kernel}"))

    def why_not(self, kernel: Implementation, *arrays: Any, device: Device, **static: Any) -> str | None:
        """Why `kernel` cannot take the arguments on `device`, or `None`."""
        if device.platform != "cuda":
            return f"it needs an NVIDIA GPU, not {device.kind}"
        return self.module(kernel).why_not(*arrays, device=device, **static)

    def rather_xla(self, kernel: Implementation, *arrays: Any, device: Device, **static: Any) -> str | None:
        """Why the reference is expected to be as fast as `kernel`, which takes the arguments, or `None`."""
        ask = getattr(self.module(kernel), "rather_xla", None)
        return None if ask is None else ask(*arrays, device=device, **static)

    def __call__(self, *arrays: Any, implementation: Implementation | None = None, **static: Any) -> Any:
        """The operator on `arrays`; `static` arguments are hashable. Under differentiation the reference runs.

        Raises:
            UnsupportedError: the named implementation cannot take the arguments, or does not exist.
        """
        implementation = _default.value if implementation is None else implementation
        if implementation == "xla":
            return self.reference(*arrays, **static)
        device = current_device()
        if implementation is None:
            return self._automatic(arrays, device, static)
        if implementation not in self.kernels:
            raise UnsupportedError(
                f"{self.name}: no implementation {implementation!r}; there are {', '.join(self.implementations)}"
            )
        if reason := self.why_not(implementation, *arrays, device=device, **static):
            raise UnsupportedError(f"{self.name}: implementation={implementation!r} cannot take this: {reason}")
        tuned = self._tuned(arrays, device, static)
        return self._run(implementation, arrays, device, static, tuned, wherever=True)

    def _automatic(self, arrays: Arrays, device: Device, static: Mapping[str, Any]) -> Any:
        if device.platform != "cuda":  # before any kernel's module is imported
            return self.reference(*arrays, **static)
        tuned = self._tuned(arrays, device, static)
        first = tuned.get("implementation")
        if first != "xla":
            for name in sorted(self.kernels, key=lambda name: name != first):
                if self.why_not(name, *arrays, device=device, **static) is None:
                    if not tuned and self.rather_xla(name, *arrays, device=device, **static):
                        break
                    # The default device says what there is, not where this call will run: lowering settles that.
                    return self._run(name, arrays, device, static, tuned, wherever=has_target())
        return self.reference(*arrays, **static)

    def _tuned(self, arrays: Arrays, device: Device, static: Mapping[str, Any]) -> Mapping[str, Any]:
        return tuning.lookup(device.kind, self.name, self.bucket(*arrays, **static)) or {}

    def _run(
        self,
        name: Implementation,
        arrays: Arrays,
        device: Device,
        static: Mapping[str, Any],
        tuned: Mapping[str, Any],
        *,
        wherever: bool,
    ) -> Any:
        config = tuned.get("config") if tuned.get("implementation") == name else None
        choice = _Choice(
            self, name, device, _items(static), None if config is None else _items(config), wherever=wherever
        )
        return _traced_once(choice)(*arrays)


@dataclasses.dataclass(frozen=True)
class _Choice:
    """One kernel with everything but its arrays; without `wherever` it runs on CUDA only, the reference elsewhere."""

    operator: Operator
    kernel: Implementation
    device: Device
    static: tuple[tuple[str, Any], ...]
    config: tuple[tuple[str, Any], ...] | None
    wherever: bool


def _items(mapping: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(mapping.items()))


@functools.cache
def _traced_once(choice: _Choice) -> Callable[..., Any]:
    """The kernel as a jitted function: the layers of a model share one trace and one lowering of it.

    Where a derivative is taken the reference runs instead, for it holds what that needs.
    """
    static = dict(choice.static)
    config = None if choice.config is None else dict(choice.config)
    reference = partial(choice.operator.reference, **static)
    run_kernel = partial(choice.operator.module(choice.kernel).run, device=choice.device, config=config, **static)

    def kernel(*arrays: Any) -> Any:
        try:
            with jax.enable_x64(False):  # kernels count in 32 bits, whatever the program around them does
                return vary_like(run_kernel(*arrays), arrays)
        except (TypeError, ValueError) as error:
            if config is None:
                raise
            # A table outlives the version of the kernel that it was made for.
            raise ConfigError(
                f"{choice.operator.name}: the tuning table's configuration {config} does not suit the kernel "
                f"{choice.kernel!r} ({error}); tune again, or remove it from {tuning.user_table()}"
            ) from error

    def forward(*arrays: Any) -> Any:
        if choice.wherever:
            return kernel(*arrays)
        return jax.lax.platform_dependent(*arrays, cuda=kernel, default=reference)

    forward.__name__ = f"{choice.operator.name}_{choice.kernel}"
    run = jax.custom_jvp(forward)

    @run.defjvp
    def _(primals: Arrays, tangents: Arrays) -> tuple[Any, Any]:
        return jax.jvp(reference, primals, tangents)

    return jax.jit(run)


@dataclasses.dataclass(frozen=True)
class ArgumentSpec:
    """Arguments that an operator is compiled, timed and tuned on.

    Attributes:
        name: model, layer and size, as "llama-8b qkv T=1 bfloat16".
        make: random arrays from a key, in the order of the reference; run under `jax.jit`.
        static: the other arguments.
        bytes: least traffic with the device's memory: every operand read once, every result written once.
        flops: floating-point operations.
        in_place: positions of the arrays that come back updated, such as caches: to be donated where it is timed, or
            the copy would be what is measured.
    """

    name: str
    make: Callable[[jax.Array], Arrays]
    bytes: int
    flops: int
    static: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    in_place: tuple[int, ...] = ()

    def abstract(self) -> Arrays:
        """Shapes and dtypes of the arrays."""
        return jax.eval_shape(self.make, jax.random.key(0))
