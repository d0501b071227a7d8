"""What is added to a model from outside, without a change to the product, runs everywhere and computes what it says."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seams
from jdsi import InferenceConfig, SamplingParams
from jdsi.engine import InferenceEngine
from jdsi.errors import ConfigError
from jdsi.layers import WIDTH, Axis, parameter
from jdsi.models import ParameterInfo, Transformer, abstract_parameters
from jdsi.models.spec import HeadSpec
from jdsi.planning import Workload, stage_memory
from jdsi.runtime.forward import forward
from jdsi.sharding import EXPERT, Evenly, Parallelism

PROMPTS = [[3, 14, 15, 9, 2], [6, 5, 35], [8, 9, 7, 9]]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", ["experts", "int8", "low_rank", "half_steps"])
def test_a_toy_runs_on_every_executor(name: str, tmp_path: Path) -> None:
    module = importlib.import_module(f"toys.{name}")
    assert module.__file__ is not None
    assert len(Path(module.__file__).read_text().splitlines()) <= 60
    toy: seams.Toy = module.TOY
    arrays = seams.random_arrays(toy.spec)
    plain = toy.plain(arrays)
    expected = [plain.greedy(prompt, 6) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    padded = np.zeros((len(PROMPTS), lengths.max()), np.int32)
    for row, prompt in enumerate(PROMPTS):
        padded[row, : len(prompt)] = prompt
    for where, executor in seams.executors(toy.spec, arrays, tmp_path / "store"):
        logits = np.asarray(forward(executor, padded, lengths))
        for row, prompt in enumerate(PROMPTS):
            np.testing.assert_allclose(
                logits[row, : len(prompt)], plain.logits(prompt), rtol=2e-3, atol=2e-4, err_msg=where
            )
        engine = InferenceEngine(executor, InferenceConfig())
        done = engine.generate(PROMPTS, SamplingParams(temperature=0, max_new_tokens=6))
        assert [completion.token_ids for completion in done] == expected, where


def test_a_parameter_may_be_divided_over_two_axes() -> None:
    experts, units = Axis("experts", Evenly(6, multiple=1)), Axis("feed_forward", Evenly(40))
    param: Any = parameter(jnp.zeros((6, 40, 24)), (experts, units, WIDTH))
    axes = param.get_metadata()["declaration"].axes
    info = ParameterInfo(param.shape, None, "layers.0", 0, "feed_forward.up", axes, False)
    over_experts, over_units = info.split(2, EXPERT), info.split(4)
    assert over_experts is not None
    assert over_units is not None
    assert over_experts.local_shape(over_units.local_shape(info.shape)) == (3, 10, 24)
    assert info.logical_axes == ("experts", "feed_forward", "width")


def test_parts_of_a_form_keep_their_types() -> None:
    toy: seams.Toy = importlib.import_module("toys.int8").TOY
    abstract = abstract_parameters(toy.spec, "bfloat16")
    types = {name: leaf.dtype.name for name, leaf in abstract.items()}
    at = "layers.1.attention.qkv.weight"
    assert (types[f"{at}.values"], types[f"{at}.scales"]) == ("int8", "float32")
    assert types["embedding.tokens.weight"] == "bfloat16"
    (memory,) = stage_memory(toy.spec, Parallelism(), Workload.decode(1, 8), rows=1, capacity=8, dtype="bfloat16")
    assert memory.weights == sum(leaf.size * leaf.dtype.itemsize for leaf in abstract.values())


def test_layers_that_cannot_be_are_named() -> None:
    form = importlib.import_module("toys.int8").Int8()
    for path in ("attention.key.weight", "attention_norm.weight", "attention.qkv"):
        wrong = dataclasses.replace(seams.LAYER, forms=((path, form),))
        with pytest.raises(ConfigError, match=rf"forms has '{path}', which is no matrix of sublayers attention, feed_"):
            abstract_parameters(seams.small_spec(wrong))
    attention, mlp = seams.LAYER.sublayers
    with pytest.raises(ConfigError, match="are called attention, attention; each needs a name of its own"):
        dataclasses.replace(seams.LAYER, sublayers=(attention, attention))
    with pytest.raises(ConfigError, match="exactly one must attend"):
        dataclasses.replace(seams.LAYER, sublayers=(mlp,))
    with pytest.raises(ConfigError, match="has no form of its own"):
        HeadSpec(tied=True, form=form)
    with pytest.raises(LookupError, match="none is of the kind TwoExpertsSpec"):
        seams.LAYER.of(importlib.import_module("toys.experts").TwoExpertsSpec)


def test_programs_name_sublayers_and_their_products() -> None:
    model = Transformer.skeleton(seams.small_spec())

    def run(leaves: list[jax.Array], tokens: jax.Array) -> jax.Array:
        return model.build(leaves)(tokens)

    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    text = jax.jit(run).lower(list(model.abstract.values()), tokens).as_text(debug_info=True)
    for scope in ("attention/qkv", "attention/attend", "attention/out", "feed_forward/up", "feed_forward/down"):
        assert f"layers.1/{scope}/" in text, scope
