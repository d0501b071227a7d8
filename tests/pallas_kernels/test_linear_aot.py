"""The linear operator's kernel compiles for an H200, at the sizes of real models, without spilling registers."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jdsi.pallas_kernels.device import H200
from jdsi.pallas_kernels.linear import LinearForm, pallas
from jdsi.pallas_kernels.linear.api import LINEAR
from jdsi.pallas_kernels.linear.specs import argument_specs
from kernels import compile_for_h200

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
def test_one_launch_where_nothing_is_split() -> None:
    """Norm, bias, activation and residual cost no kernel of their own."""
    spec = SPECS["gpt-j up T=1 bfloat16"]
    text = compile_for_h200(partial(LINEAR, implementation="pallas", **spec.static), *spec.abstract()).text
    assert text.count("custom-call(") == 1
    assert " fusion(" not in text


@pytest.mark.aot
def test_half_precision_and_odd_inputs() -> None:
    x, weight = jax.ShapeDtypeStruct((3, 1608), jnp.float16), jax.ShapeDtypeStruct((4096, 1608), jnp.float16)
    bias = jax.ShapeDtypeStruct((4096,), jnp.float32)
    for form in (LinearForm("gelu"), LinearForm("tanh", gated=True)):
        compiled = compile_for_h200(partial(LINEAR, implementation="pallas", form=form), x, weight, bias)
        assert compiled.spills == 0


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_every_spec_is_taken_and_has_candidates(spec) -> None:
    arrays = spec.abstract()
    assert pallas.why_not(*arrays, device=H200, **spec.static) is None
    candidates = pallas.candidates(*arrays, device=H200, **spec.static)
    assert 1 <= len(candidates) <= 16
    assert candidates[0].keys() == {"rows", "step", "stages", "splits"}


@pytest.mark.aot
def test_candidates_compile() -> None:
    spec = SPECS["llama-8b out T=64 bfloat16"]
    arrays = spec.abstract()
    for config in pallas.candidates(*arrays, device=H200, **spec.static)[::4]:
        compiled = compile_for_h200(partial(pallas.run, device=H200, config=config, **spec.static), *arrays)
        assert compiled.spills == 0
