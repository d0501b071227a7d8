"""The linear operator's kernel compiles for an H200, at the sizes of real models, without spilling registers."""

from collections import Counter
from functools import partial

import jax
import numpy as np
import pytest

from jdsi.pallas_kernels.device import H200
from jdsi.pallas_kernels.linear import LinearForm, pallas
from jdsi.pallas_kernels.linear.api import LINEAR
from jdsi.pallas_kernels.linear.specs import argument_specs
from jdsi.pallas_kernels.normalization import NormForm
from kernels import compile_for_h200
from lowered import kernels_of

SPECS = {spec.name: spec for spec in argument_specs()}
# Every kind of program once: fused norm, streamed x, split inputs, gate, weights that tiles do not divide.
COMPILED = [
    "llama-8b qkv T=1 bfloat16",
    "llama-8b out T=8 bfloat16",
    "llama-8b gate_up T=1 bfloat16",
    "llama-8b gate_up T=64 bfloat16",
    "llama-8b down T=10 bfloat16",
    "llama-70b down T=64 bfloat16",
    "opt-30b up T=4 bfloat16",
    "gpt-2-xl up T=2 bfloat16",
    "gpt-2-xl head T=1 bfloat16",
    "mixtral-8x7b expert gate_up T=8 bfloat16",
]


@pytest.mark.aot
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_spills(name: str) -> None:
    spec = SPECS[name]
    compiled = compile_for_h200(partial(LINEAR, implementation="pallas", **spec.static), *spec.abstract())
    assert 0 < compiled.registers <= 255
    assert compiled.spills == 0


@pytest.mark.aot
@pytest.mark.parametrize("name", ["gpt-j up T=1 bfloat16", "mixtral-8x7b expert gate_up T=10 bfloat16"])
def test_one_launch_where_nothing_is_split(name: str) -> None:
    """Norm, bias, activation, gate and tokens that fill no tile cost no kernel of their own."""
    spec = SPECS[name]
    text = compile_for_h200(partial(LINEAR, implementation="pallas", **spec.static), *spec.abstract()).text
    assert text.count("custom-call(") == 1
    assert " fusion(" not in text


def test_xla_multiplies_where_parts_weigh_too_much() -> None:
    left = [spec for spec in SPECS.values() if pallas.rather_xla(*spec.abstract(), device=H200, **spec.static)]
    assert {"llama-8b qkv T=64 bfloat16", "llama-8b out T=64 bfloat16"} <= {spec.name for spec in left}
    assert all(" T=64 " in spec.name for spec in left)
    spec = SPECS["llama-8b down T=64 bfloat16"]
    assert pallas.rather_xla(*spec.abstract(), device=H200, **spec.static) is None
    out = SPECS["llama-8b out T=64 bfloat16"]
    assert not kernels_of(partial(LINEAR, **out.static), *out.abstract())
    assert kernels_of(partial(LINEAR, **spec.static), *spec.abstract())


def test_a_fused_norm_waits_for_one_copy_of_each_array() -> None:
    """Before the first weights are asked for; and a residual comes in one copy a tile, however many tokens it has."""
    for name, copies in {
        "llama-8b gate_up T=8 bfloat16": {0: 1, 2: 1},  # x and the norm's weight
        "gpt-j up T=1 bfloat16": {0: 1, 2: 1, 3: 1, 4: 1},  # x, the bias, the norm's weight and bias
        "llama-8b out T=8 bfloat16": {2: 1},  # the residual
    }.items():
        spec = SPECS[name]
        [kernel] = kernels_of(partial(LINEAR, implementation="pallas", **spec.static), *spec.abstract())
        loads = Counter(copy.argument for copy in kernel.copies if not copy.store)
        assert {argument: loads[argument] for argument in copies} == copies


FLOAT32 = np.dtype("float32")
LAYER = NormForm(centred=True, eps=1e-5)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("form", "x", "rows", "others"),
    [
        (LinearForm("gelu"), ("float16", 3, 1608), 4096, {"bias": FLOAT32}),
        (LinearForm("tanh", gated=True), ("float16", 3, 1608), 4096, {"bias": FLOAT32}),
        (LinearForm(out_dtype=FLOAT32), ("bfloat16", 8, 512), 256, {"residual": FLOAT32}),
        (LinearForm(norm=LAYER), ("bfloat16", 8, 512), 256, {"norm_weight": FLOAT32, "norm_bias": FLOAT32}),
        (LinearForm(norm=LAYER), ("bfloat16", 1, 512), 256, {}),
        (LinearForm(out_dtype=np.dtype("float16")), ("bfloat16", 11, 8), 8, {}),
    ],
)
def test_other_dtypes_and_odd_sizes(form: LinearForm, x: tuple, rows: int, others: dict) -> None:
    dtype, tokens, inputs = x
    shapes = {"bias": (rows,), "residual": (tokens, rows), "norm_weight": (inputs,), "norm_bias": (inputs,)}
    arrays = [jax.ShapeDtypeStruct((tokens, inputs), dtype), jax.ShapeDtypeStruct((rows, inputs), dtype)]
    arrays += [jax.ShapeDtypeStruct(shapes[name], others[name]) if name in others else None for name in shapes]
    assert compile_for_h200(partial(LINEAR, implementation="pallas", form=form), *arrays).spills == 0


def test_every_spec_is_taken_and_has_candidates() -> None:
    for name, spec in SPECS.items():
        arrays = spec.abstract()
        assert pallas.why_not(*arrays, device=H200, **spec.static) is None, name
        candidates = pallas.candidates(*arrays, device=H200, **spec.static)
        assert 1 <= len(candidates) <= 16, name
        assert candidates[0].keys() == {"rows", "step", "stages", "splits"}, name


@pytest.mark.aot
def test_candidates_compile() -> None:
    spec = SPECS["llama-8b out T=64 bfloat16"]
    arrays = spec.abstract()
    for config in pallas.candidates(*arrays, device=H200, **spec.static)[::4]:
        compiled = compile_for_h200(partial(pallas.run, device=H200, config=config, **spec.static), *arrays)
        assert compiled.spills == 0


@pytest.mark.aot
@pytest.mark.parametrize("config", [{"stages": 1000}, {"rows": 256, "stages": 7}, {"step": 100}])
def test_a_tiling_tuned_for_others_is_fitted_to_the_call(config: dict[str, int]) -> None:
    spec = SPECS["llama-8b qkv T=8 bfloat16"]
    run = partial(pallas.run, device=H200, config=config, **spec.static)
    assert compile_for_h200(run, *spec.abstract()).spills == 0
