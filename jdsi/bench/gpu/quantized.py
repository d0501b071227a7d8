"""All products of a decoding step with quantised weights: what int8 and int4 can make of a model that decodes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jdsi.models.spec import AttentionSpec, LayerSpec, MlpSpec, TransformerSpec
from jdsi.pallas_kernels import NormForm, gated_linear, linear
from jdsi.pallas_kernels.operator import default_implementation
from jdsi.pallas_kernels.quantized_linear import (
    QuantizedWeight,
    WeightFormat,
    quantize,
)

from ..calls import tree_bytes
from ..device_limits import DeviceLimits
from ..report import spread
from ..rounds import Ratio, seconds
from ..shapes import shape_config
from .backend import start
from .contenders import prepared, ratios, take_turns
from .model_shapes import model_spec
from .stage_worker import Task

_ROUNDS, _TINY_ROUNDS = 5, 2
_BATCHES = (1, 8, 64)
_PASSES = 20  # in a figure
_NORM = NormForm(centred=False, eps=1e-5)

Weights = list[dict[str, Any]]  # of each layer, the norm among them


@dataclasses.dataclass(frozen=True)
class Products:
    """The four products of every layer, one after another, with the norms before and the sums behind them.

    Attributes:
        spec: the model.
        stored: how its matrices are; `None` for bfloat16.
    """

    spec: TransformerSpec
    stored: WeightFormat | None

    def weights(self, key: jax.Array) -> Weights:
        """Random ones, made on the device one matrix at a time."""
        layers = []
        for layer, own in zip(self.spec.layers, jax.random.split(key, len(self.spec.layers)), strict=True):
            keys = jax.random.split(own, 4)
            shapes = _shapes(layer, self.spec.width)
            made = {name: _matrix(k, shape, self.stored) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
            layers.append(made | {"norm": jnp.ones(self.spec.width, jnp.bfloat16)})
        return layers

    def run(self, x: Float[Array, "T E"], layers: Weights) -> Float[Array, "T E"]:
        """The products of a step for `T` tokens."""
        for layer, weights in zip(self.spec.layers, layers, strict=True):
            norm: dict[str, Any] = {"norm": _NORM, "norm_weight": weights["norm"]}
            heads = linear(x, weights["qkv"], **norm)[:, : layer.of(AttentionSpec).qkv_rows[0]]
            x = linear(heads, weights["out"], residual=x)
            mlp = layer.of(MlpSpec)
            up = gated_linear if mlp.gated else linear
            hidden = up(x, weights["up"], activation=mlp.activation, **norm)
            x = linear(hidden, weights["down"], residual=x)
        return x


def _shapes(layer: LayerSpec, width: int) -> dict[str, tuple[int, int]]:
    mlp, heads = layer.of(MlpSpec), layer.of(AttentionSpec).qkv_rows
    return {
        "qkv": (sum(heads), width),
        "out": (width, heads[0]),
        "up": (mlp.up_rows, width),
        "down": (width, mlp.width),
    }


@partial(jax.jit, static_argnums=(1, 2))
def _matrix(key: jax.Array, shape: tuple[int, int], stored: WeightFormat | None) -> Array | QuantizedWeight:
    matrix = jax.random.normal(key, shape, jnp.bfloat16) * jnp.asarray(shape[1] ** -0.5, jnp.bfloat16)
    return matrix if stored is None else quantize(matrix, stored)


def measure(task: Task, model: str) -> None:
    """Seconds of all products of a step, in bfloat16 with and without kernels, in int8 and in int4.

    Args:
        task: the stage's.
        model: one of `MODELS`.
    """
    device = start(task)
    tiny = task.rehearsal
    spec = _tiny_spec() if tiny else model_spec(model)
    task.doing("random weights")
    key = jax.random.key(0, impl="rbg")
    programs = {name: Products(spec, stored) for name, stored in _forms(tiny=tiny).items()}
    weights = {name: jax.block_until_ready(program.weights(key)) for name, program in programs.items()}
    limits = DeviceLimits(2**20, 128, "float32") if tiny else DeviceLimits.of(device.platform)
    copy = limits.contenders()["copy"]
    for batch in task.cases(_BATCHES, lambda batch: f"batch {batch}"):
        what = f"{model} products, batch {batch}"
        x = jax.random.normal(key, (batch, spec.width), jnp.bfloat16)
        calls = {name: _jitted(programs[name], None, x, weights[name]) for name in programs}
        calls["bfloat16, xla"] = _jitted(programs["bfloat16"], "xla", x, weights["bfloat16"])
        made = prepared(task, what, {name: partial(call, 1) for name, call in calls.items()})
        runs = {name: partial(_per_pass, calls[name], 1 if tiny else _PASSES) for name in made}
        figures = take_turns(task, what, {"copy": copy, **runs}, _TINY_ROUNDS if tiny else _ROUNDS)
        bandwidths = limits.bandwidths(figures.pop("copy", []))
        for name, times in figures.items():
            moved = tree_bytes(weights[name.partition(",")[0]])
            share = {"share": Ratio.of([moved / b for b in bandwidths], times)} if bandwidths else {}
            task.emit(what, name, seconds=spread(times), bytes=moved, over=ratios(figures, name), **share)
    if tiny and not task.short:
        _compile(task, model)


def _forms(*, tiny: bool) -> Mapping[str, WeightFormat | None]:
    return {"bfloat16": None, "int8": WeightFormat("int8"), "int4": WeightFormat("int4", 32 if tiny else 128)}


def _tiny_spec() -> TransformerSpec:
    from jdsi.models.families import family_for

    return family_for("llama").spec(shape_config("llama-mini"))


def _jitted(program: Products, implementation: Any, x: Array, weights: Weights) -> Callable[[int], None]:
    """The products as one program, run so many times; where `implementation` is named, with nothing else."""

    @jax.jit
    def run(x: Array, weights: Weights) -> Array:
        with default_implementation(implementation):
            return program.run(x, weights)

    def call(count: int) -> None:
        jax.block_until_ready([run(x, weights) for _ in range(count)])

    return call


def _per_pass(call: Callable[[int], None], count: int) -> float:
    return seconds(lambda: call(count)) / count


def _compile(task: Task, model: str) -> None:
    """Compiles the products for an H200 at the model's real size."""
    from .rehearsal import compile_seconds, why_not_compiled

    if why := why_not_compiled():
        task.emit(f"{model} products for an H200", skipped=why)
        return
    spec = model_spec(model)
    forms: Sequence[tuple[str, WeightFormat | None]] = [*_forms(tiny=False).items()]
    for name, stored in task.cases(forms, lambda form: f"{form[0]} for an H200"):
        program = Products(spec, stored)
        weights = jax.eval_shape(program.weights, jax.random.key(0))
        x = jax.ShapeDtypeStruct((1, spec.width), jnp.bfloat16)
        took = compile_seconds(program.run, x, weights)
        task.emit(f"{model} products for an H200", name, facts={"seconds to compile": round(took, 1)})
