"""Every rotary scaling against transformers: frequencies, and whole models under and over the original length."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoConfig, Gemma3TextConfig, LlamaConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jdsi.converters import load_spec
from jdsi.errors import ConfigError
from jdsi.models.families import family_for
from jdsi.models.families.rope import rotary, rotary_dim
from jdsi.models.spec import AttentionSpec
from jdsi.pallas_kernels import base_frequencies
from kernels import with_slow
from parity import check_causal

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + i for i in range(8)],
    "original_max_position_embeddings": 64,
}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": YARN,
    "yarn-mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 0.5},
    "yarn-untruncated": YARN | {"truncate": False, "beta_fast": 16, "beta_slow": 2},
    "yarn-attention-factor": YARN | {"attention_factor": 1.25, "beta_fast": 1.0, "beta_slow": 1.0},
    "yarn-factor-from-lengths": YARN | {"factor": None},
    "longrope": LONGROPE,
    "longrope-factor": LONGROPE | {"factor": 3.0},
    "longrope-attention-factor": LONGROPE | {"attention_factor": 0.9},
    "llama3": LLAMA3,
}


def config_of(scaling: dict[str, Any], **change: Any) -> LlamaConfig:
    small = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256}
    parameters = {"rope_theta": 5000.0} | scaling
    return LlamaConfig(**small | heads | change, rope_parameters=parameters)


@pytest.mark.parity
@pytest.mark.parametrize("length", [1, 64, 65, 256, 257, 1000])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies(name: str, length: int) -> None:
    config = config_of(dict(SCALINGS[name]))
    compute = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
    expected, factor = compute(config, torch.device("cpu"), seq_len=torch.tensor(length))
    ours = rotary(config, 16)
    assert ours.scaling is not None
    frequencies = np.asarray(ours.scaling.frequencies(16, ours.theta, jnp.asarray([length])))
    np.testing.assert_allclose(frequencies.reshape(-1), expected.numpy(), rtol=1e-6)
    assert ours.scaling.attention_factor == pytest.approx(factor, rel=1e-12)
    hash(ours)


@pytest.mark.parity
def test_the_original_length_at_the_top_level_wins(tmp_path: Path) -> None:
    """As a `config.json` has it, which config classes read in two steps: beside what it is to replace, or alone."""
    shape = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 1}
    sizes = {"head_dim": 16, "max_position_embeddings": 256, "rope_theta": 5000.0, "pad_token_id": 0}
    for family, scaling in itertools.product(("llama", "mistral", "qwen2", "qwen3", "phi3"), (YARN, LONGROPE, LLAMA3)):
        for inside in (64, None):
            nested = {"type": scaling["rope_type"]} | scaling | {"original_max_position_embeddings": inside}
            nested = {key: value for key, value in nested.items() if value is not None}
            config = {"model_type": family, **shape, **sizes, "rope_scaling": nested}
            config["original_max_position_embeddings"] = 32
            (tmp_path / "config.json").write_text(json.dumps(config))
            if family == "phi3" and scaling is not LONGROPE:
                continue  # its config class takes no other scaling
            theirs, spec = AutoConfig.from_pretrained(tmp_path), load_spec(tmp_path)
            rotary = spec.layers[0].of(AttentionSpec).rotary
            assert rotary is not None
            assert rotary.scaling is not None
            for length in (16, 48, 300):
                compute = ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
                expected, factor = compute(theirs, torch.device("cpu"), seq_len=torch.tensor(length))
                found = np.asarray(rotary.scaling.frequencies(16, rotary.theta, jnp.asarray([length])))
                where = f"{family} {scaling['rope_type']} {inside} {length}"
                np.testing.assert_allclose(found.reshape(-1), expected.numpy(), rtol=1e-6, err_msg=where)
                assert rotary.scaling.attention_factor == pytest.approx(factor, rel=1e-12), where


@pytest.mark.parity
@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6])
@pytest.mark.parametrize("dim", [8, 72, 96, 128])
def test_base_frequencies_are_those_of_pytorch_to_the_last_bit_but_one(dim: int, theta: float) -> None:
    theirs = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
    np.testing.assert_array_max_ulp(base_frequencies(dim, theta), theirs.numpy(), maxulp=1)


# Ascending, with a gap of more than the six generated tokens: transformers' dynamic scaling keeps the frequencies of
# the longest sequence a module has seen.
LENGTHS = (3, 15, 23, 38)
LENGTH_DEPENDENT = {
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "longrope": LONGROPE | {"original_max_position_embeddings": 19},
}
FIXED = {
    "linear": SCALINGS["linear"],
    "yarn": YARN | {"original_max_position_embeddings": 19, "mscale": 1.0, "mscale_all_dim": 0.4},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 19},
}


@pytest.mark.parity
# Frequencies are compared above; these also scale attention, or change in between.
@pytest.mark.parametrize("name", with_slow([*FIXED, *LENGTH_DEPENDENT], ["linear", "llama3"]))
def test_parity_under_and_over_the_original_length(name: str) -> None:
    # 15 + 6 tokens also cross the length at which dynamic and longrope change, 19, while generating.
    config = config_of(dict((FIXED | LENGTH_DEPENDENT)[name]), max_position_embeddings=19)
    check_causal(config, lengths=LENGTHS)


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}])
def test_the_older_spelling_gives_the_same_spec(scaling: dict[str, Any]) -> None:
    old = LlamaConfig(rope_theta=700.0, rope_scaling=scaling)
    new = LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0})
    assert family_for("llama").spec(old) == family_for("llama").spec(new)
    assert family_for("llama").spec(old) != family_for("llama").spec(LlamaConfig(rope_theta=700.0))


def test_parameters_per_layer_type() -> None:
    config = Gemma3TextConfig(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    )
    full, sliding = rotary(config, 16, "full_attention"), rotary(config, 16, "sliding_attention")
    assert (full.theta, sliding.theta, sliding.scaling) == (1e6, 1e4, None)
    assert full.scaling is not None
    with pytest.raises(ConfigError, match="'chunked_attention'"):
        rotary(config, 16, "chunked_attention")


def test_parameters_per_layer_type_where_the_family_has_none() -> None:
    config = Qwen3Config(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}})
    with pytest.raises(ConfigError, match="must be one dict"):
        family_for("qwen3").spec(config)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "yarnn"}, "unknown rope_type 'yarnn'.*did you mean 'yarn'.*known: default, linear, dynamic"),
        ({"rope_type": "linear"}, "'linear' lacks rope_theta, factor"),
        ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}, "lacks original_max_position_embeddings"),
        ({"rope_type": "longrope", "rope_theta": 1e4}, "lacks short_factor, long_factor, original_max"),
        ({"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}, "lacks low_freq_factor, high_freq_factor"),
        ({**LLAMA3, "rope_theta": 1e4, "high_freq_factor": 1.0}, "high_freq_factor 1.0"),
        ({**LONGROPE, "rope_theta": 1e4, "long_factor": [1.0]}, "long_factor of rope_parameters has 1 numbers"),
    ],
)
def test_impossible_parameters_are_an_error(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rotary(SimpleNamespace(rope_parameters=parameters, max_position_embeddings=256), 16)


@pytest.mark.parametrize(("factor", "dim"), [(None, 12), (0.5, 6), (1.0, 12), (0.4, 4)])
def test_partial_rotary(factor: float | None, dim: int) -> None:
    parameters = {} if factor is None else {"partial_rotary_factor": factor}
    assert rotary_dim(SimpleNamespace(rope_parameters=parameters), 12) == dim


@pytest.mark.parametrize("factor", [0.3, 0.0, 1.5, None, "half"])
def test_partial_rotary_that_fits_no_pairs_is_an_error(factor: object) -> None:
    with pytest.raises(ConfigError, match="partial_rotary_factor"):
        rotary_dim(SimpleNamespace(rope_parameters={"partial_rotary_factor": factor}), 12)
