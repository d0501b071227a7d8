"""Prefill attention's Mosaic GPU kernel compiled for an H200: no registers spill, whatever the variant."""

from functools import partial

import jax
import pytest

from jdsi.pallas_kernels.attention import Alibi, AttentionForm
from jdsi.pallas_kernels.operator import ArgumentSpec
from jdsi.pallas_kernels.prefill_attention import PREFILL_ATTENTION
from jdsi.pallas_kernels.prefill_attention.specs import argument_specs
from kernels import compile_for_h200
from prefill_cases import Case

ALIBI = Alibi((0.5, 0.05))
EVERYTHING = AttentionForm(1.0, True, 9, 5.0, ALIBI)
SPECS = {spec.name: spec for spec in argument_specs() if "S=8192" in spec.name or "B=16" in spec.name}


@pytest.mark.aot
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_kernel_compiles_without_spills(spec: ArgumentSpec) -> None:
    compiled = compile_for_h200(partial(PREFILL_ATTENTION, implementation="pallas", **spec.static), *spec.abstract())
    assert 0 < compiled.registers <= 255
    assert compiled.spills == 0


VARIANTS = {
    "padded": Case(77, 203, (2, 2), form=AttentionForm(0.125, causal=False)),
    "few": Case(3, 5),
    "alibi": Case(256, 256, (2, 2), form=AttentionForm(0.125, alibi=ALIBI)),
    "everything": Case(1001, 3001, (2, 2), (192, 128), EVERYTHING, 2, (3, 4), (5, 6), (800, 201)),
    "everything, wide": Case(256, 256, (2, 2), (256, 256), EVERYTHING, 1, (0,), (9,), segments=(9,)),
}


@pytest.mark.aot
@pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_compiles_without_spills(case: Case) -> None:
    arrays = jax.eval_shape(lambda: case.arrays("bfloat16"))
    kernel = partial(PREFILL_ATTENTION, implementation="pallas", form=case.form, return_lse=True)
    assert compile_for_h200(kernel, *arrays).spills == 0
