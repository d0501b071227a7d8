"""How a folder wants its model sampled, against what transformers makes of the same files."""

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.special import softmax
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from jdsi.errors import CapacityError, CheckpointError, ConfigError, JdsiWarning
from jdsi.generation import SamplerFeatures, SamplingParams, init_state, process
from jdsi.generation.defaults import GenerationDefaults
from jdsi.generation.sampling_fields import NEUTRAL
from jdsi.generation.transformers_names import IN_FILES

VOCAB = 97


def write(folder: Path, generation: Any, config: Any = None) -> Path:
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        (folder / name).unlink(missing_ok=True)
        if value is not None:
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def read(folder: Path, generation: Any, config: Any = None) -> GenerationDefaults:
    return GenerationDefaults.read(write(folder, generation, config))


@functools.cache
def torch_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    return LlamaForCausalLM(config)


def theirs(folder: Path, prompt: list[int], logits: np.ndarray, **options: Any) -> np.ndarray:
    """The logits that transformers would sample from."""
    model = torch_model()
    model.generation_config = GenerationConfig.from_pretrained(folder)
    config, _ = model._prepare_generation_config(None, **options)
    model._prepare_special_tokens(config)
    config = model._prepare_generated_length(config, False, False, "input_ids", len(prompt), torch.tensor([prompt]))
    chain = model._get_logits_processor(config, input_ids_seq_length=len(prompt), device="cpu")
    return chain(torch.tensor([prompt]), torch.tensor(logits[None]))[0].numpy()


def ours(defaults: GenerationDefaults, prompt: list[int], logits: np.ndarray, **options: Any) -> np.ndarray:
    params = [defaults.fill(SamplingParams(**options), len(prompt), 1000)]
    state = init_state(params, [prompt], vocab_size=VOCAB, eos_token_ids=defaults.eos_token_ids or ())
    return np.asarray(process(jnp.asarray(logits[None]), state, SamplerFeatures.of(params)))[0]


FILES: list[dict[str, Any]] = [
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    {"do_sample": True, "top_k": 0, "temperature": 1.5},
    {"do_sample": True, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.3, "eos_token_id": [3, 5]},
    {"do_sample": True, "temperature": None, "no_repeat_ngram_size": 2, "min_new_tokens": 3, "eos_token_id": 3},
    {"do_sample": True, "top_p": 0.5, "min_length": 11, "max_length": 30, "eos_token_id": 3},
    {"do_sample": True, "top_p": 0.5, "min_length": 4, "max_length": 30, "eos_token_id": 3},
    {"do_sample": True, "typical_p": 0.7, "top_k": 0, "suppress_tokens": [1, 5, 90], "begin_suppress_tokens": [7]},
    {"do_sample": True, "eta_cutoff": 0.02, "epsilon_cutoff": 0.001, "sequence_bias": [[[5], 1.5], [[1, 2], -2.0]]},
    {
        "do_sample": True,
        "bad_words_ids": [[5], [8, 1]],
        "exponential_decay_length_penalty": [0, 1.5],
        "eos_token_id": 5,
    },
]
CALLERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"top_k": 5},
    {"top_p": 1.0, "repetition_penalty": 1.0},
    {"temperature": 2.0, "top_k": 3, "min_p": 0.2},
]


@pytest.mark.parity
def test_what_is_sampled_from_is_what_transformers_samples_from(tmp_path):
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 9, 10).tolist()
    logits = rng.normal(0, 3, VOCAB).astype(np.float32)
    for file in FILES:
        defaults = read(tmp_path, file)
        for options in CALLERS:
            expected = theirs(tmp_path, prompt, logits, **options)
            found = ours(defaults, prompt, logits, **options)
            np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected), err_msg=f"{file} {options}")
            np.testing.assert_allclose(softmax(found), softmax(expected), rtol=1e-5, atol=1e-12)


def test_every_option_arrives_under_its_name_here(tmp_path):
    file = {
        "max_new_tokens": 12,
        "min_new_tokens": 2,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.75,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 4,
        "stop_strings": "END",
        "num_beams": 1,
        "typical_p": 0.875,
        "epsilon_cutoff": 0.125,
        "eta_cutoff": 0.0625,
        "sequence_bias": [[[5], 1.5], [[1, 2], -2.0]],
        "bad_words_ids": [[3, 4], [5]],
        "suppress_tokens": [1, 2],
        "begin_suppress_tokens": [3],
        "forced_bos_token_id": 4,
        "forced_eos_token_id": [5, 6],
        "exponential_decay_length_penalty": [15, 1.25],
        "renormalize_logits": True,
        "guidance_scale": 1.5,
        "num_return_sequences": 2,
    }
    assert set(file) == {*IN_FILES, "do_sample"} - {"length_penalty", "early_stopping"}
    names = {"no_repeat_ngram_size": "no_repeat_ngram", "stop_strings": "stop", "sequence_bias": "logit_bias"}
    names |= {"num_return_sequences": "n"}
    values = {names.get(key, key): value for key, value in file.items() if key != "do_sample"}
    values |= {
        "stop": ("END",),
        "logit_bias": (((5,), 1.5), ((1, 2), -2.0)),
        "bad_words_ids": ((3, 4), (5,)),
        "suppress_tokens": (1, 2),
        "begin_suppress_tokens": (3,),
        "forced_eos_token_id": (5, 6),
        "exponential_decay_length_penalty": (15, 1.25),
    }
    assert read(tmp_path, file).values == values
    # Without the first file the second says it, among other keys; what is nested there comes last.
    config = {"model_type": "llama", "hidden_size": 8, "text_config": {"top_k": 1, "repetition_penalty": 3.0}}
    assert read(tmp_path, None, {**config, **file}).values == values
    assert read(tmp_path, None, config).values == {"top_k": 1, "repetition_penalty": 3.0}
    assert read(tmp_path, {}, {**config, **file}).values == {}
    filled = read(tmp_path, file).fill(SamplingParams(seed=1, top_k=0), 5, 1000)
    assert dict(filled.given) == {**NEUTRAL, **values, "top_k": 0, "seed": 1}
    assert GenerationDefaults.read(write(tmp_path, file), "ignore") == GenerationDefaults()
    assert read(tmp_path, None, None) == GenerationDefaults()


def test_without_do_sample_the_search_is_greedy(tmp_path):
    for file in ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": False, "temperature": 0.6, "top_p": 0.9}):
        defaults = read(tmp_path, file)
        assert defaults.fill(SamplingParams(), 5, 100) == SamplingParams().filled({"max_new_tokens": 95})
        sampled = defaults.fill(SamplingParams(temperature=1), 5, 100)
        assert (sampled.temperature, sampled.top_p, sampled.top_k) == (1, 0.9, 0)
        with pytest.raises(ConfigError, match=r"top_k=5 must be used with a temperature above 0"):
            defaults.fill(SamplingParams(top_k=5), 5, 100)
    defaults = read(tmp_path, {"do_sample": True})
    assert defaults.fill(SamplingParams(temperature=0), 5, 100) == SamplingParams().filled({"max_new_tokens": 95})
    assert defaults.fill(SamplingParams(), 5, 100).top_k == 50
    assert read(tmp_path, {"do_sample": True, "temperature": 0.0}).fill(SamplingParams(), 5, 100).greedy


def test_lengths(tmp_path):
    def lengths(file: Any, prompt: int, most: int = 1000, **options: Any) -> tuple[int, int]:
        params = read(tmp_path, file).fill(SamplingParams(**options), prompt, most)
        return params.min_new_tokens, params.max_new_tokens

    assert lengths(None, 5) == (0, 128)
    assert lengths(None, 5, most=25) == (0, 20)
    assert lengths(None, 25, most=25) == (0, 1)  # one too many, which is refused later on
    assert lengths({"max_new_tokens": 300}, 5) == (0, 300)
    assert lengths({"max_new_tokens": 300}, 5, most=100) == (0, 95)
    assert lengths({"max_length": 30}, 5) == (0, 25)
    assert lengths({"max_length": 30, "max_new_tokens": 40}, 35) == (0, 40)
    assert lengths({"max_length": 30}, 35, max_new_tokens=3) == (0, 3)
    assert lengths({"min_length": 20}, 5) == (15, 128)
    assert lengths({"min_length": 20, "min_new_tokens": 2}, 5) == (2, 128)
    assert lengths({"min_length": 20}, 25) == (0, 128)
    assert lengths({"min_length": 20, "max_length": 10}, 5) == (5, 5)
    assert lengths({"min_new_tokens": 20}, 5, max_new_tokens=7) == (7, 7)
    assert lengths({"min_new_tokens": 20}, 5, min_new_tokens=0) == (0, 128)
    for prompt in (30, 31):
        with pytest.raises(CapacityError, match=rf"^p has {prompt} tokens, and max_length of .*n_config\.json is 30"):
            read(tmp_path, {"max_length": 30}).fill(SamplingParams(), prompt, 1000, "p")
    with pytest.raises(ConfigError, match=r"min_new_tokens=200 must be at most max_new_tokens=128"):
        read(tmp_path, None).fill(SamplingParams(min_new_tokens=200), 5, 1000)
    with pytest.raises(ConfigError, match=r"min_new_tokens=20 must be at most max_new_tokens=7"):
        read(tmp_path, {"max_new_tokens": 7}).fill(SamplingParams(min_new_tokens=20), 5, 1000)


def test_beams_and_sampling_exclude_each_other(tmp_path):
    def fill(file: Any, **options: Any) -> dict[str, Any]:
        return read(tmp_path, file).fill(SamplingParams(**options), 5, 1000).changes

    searches = {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True, "top_p": 0.9}
    beams = {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True}
    assert fill(searches) == beams
    assert fill(searches, temperature=0, top_k=3) == beams
    assert fill(searches, num_beams=2) == {**beams, "num_beams": 2}
    assert fill(searches, num_beams=1) == {}
    assert fill(searches, num_beams=1, temperature=1) == {"temperature": 1, "top_p": 0.9}
    with pytest.warns(JdsiWarning, match=r"temperature=1 samples: .* does not search with beams here"):
        assert fill(searches, temperature=1) == {"temperature": 1, "top_p": 0.9}
    samples = {"do_sample": True, "temperature": 0.7, "min_p": 0.1, "length_penalty": 0.5}
    assert fill(samples) == {"temperature": 0.7, "top_k": 50, "min_p": 0.1}
    with pytest.warns(JdsiWarning, match=r"num_beams=2 searches with beams: .* does not sample here"):
        assert fill(samples, num_beams=2) == {"num_beams": 2, "length_penalty": 0.5}
    both = {**searches, **samples}
    with pytest.raises(ConfigError, match=r"n_config\.json asks for do_sample with num_beams=3: .*give num_beams=1"):
        fill(both)
    assert fill(both, temperature=0) == beams
    assert fill(both, num_beams=1) == {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.1}
    with pytest.raises(ConfigError, match=r"temperature=1.0 must be 0.0 with num_beams=2: beams are not sampled"):
        fill(both, num_beams=2, temperature=1)
    with pytest.raises(ConfigError, match=r"length_penalty=50.0 of .*n_config\.json must be from -13.3 to 13.3 with"):
        fill({"num_beams": 2, "length_penalty": 50})
    several = {"num_return_sequences": 4}
    assert fill({"do_sample": True, "top_k": 0, **several}) == {"temperature": 1, "n": 4}
    assert fill({"do_sample": True, **several}, temperature=0) == {}
    assert fill({"num_beams": 3, **several}) == {"num_beams": 3, "n": 3}
    assert fill({"num_beams": 3, **several}, n=1) == {"num_beams": 3}
    assert fill(several) == {}
    assert read(tmp_path, several).unsupported == ("num_return_sequences",)
    with pytest.raises(ConfigError, match=r"guidance_scale=2.0 of .*n_config\.json must be 1.0 with num_beams=2: only"):
        fill({"guidance_scale": 2}, num_beams=2)
    defaults = read(tmp_path, samples)
    with pytest.warns(JdsiWarning):
        defaults.fill(SamplingParams(num_beams=2), 5, 1000)
    defaults.fill(SamplingParams(num_beams=2), 5, 1000)  # and no second time, for warnings are errors here


def test_what_cannot_be_honoured_is_named_once_and_how_it_is_done_is_not(tmp_path):
    file = {
        "penalty_alpha": 0.6,
        "dola_layers": "high",
        "num_beam_groups": 2,
        "diversity_penalty": 0.3,
        "force_words_ids": [[3]],
        "watermarking_config": {"bias": 2.5},
        "prompt_lookup_num_tokens": 3,
        "encoder_repetition_penalty": 1.2,
        "token_healing": True,
        "max_time": 3.0,
        "remove_invalid_values": True,
        "of_somebody_else": [1],
    }
    immaterial = {
        "use_cache": False,
        "cache_implementation": "hybrid",
        "return_dict_in_generate": True,
        "output_scores": True,
        "pad_token_id": 3,
        "bos_token_id": 500,
        "transformers_version": "4.0",
        "_from_model_config": True,
        "num_beam_groups": 1,
        "diversity_penalty": 0.0,
        "encoder_no_repeat_ngram_size": 0,
        "remove_invalid_values": False,
        "max_time": None,
        "unheard_of": None,
    }
    defaults = read(tmp_path, {**immaterial, **file})
    assert set(defaults.unsupported) == set(file)
    with pytest.warns(JdsiWarning, match=r"generation_config\.json asks for .*, which cannot be honoured") as told:
        defaults.warn()
    defaults.warn()
    assert all(key in str(told[0].message) for key in file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path, immaterial).unsupported == ()
        read(tmp_path, immaterial).warn()
        assert read(tmp_path, None, {"vocab_size": 3, "of_somebody_else": 1, "max_time": 1}).unsupported == (
            "max_time",
        )


def test_values_that_are_none_name_file_and_key(tmp_path):
    wrong = {
        "do_sample": [1, "yes"],
        "temperature": ["0.5", -1, True],
        "top_k": [-1, 2.5],
        "top_p": [0, 1.5],
        "min_p": [2],
        "repetition_penalty": [0, 1e-45, 1e39],
        "no_repeat_ngram_size": [-1],
        "max_new_tokens": [0],
        "min_new_tokens": [-1],
        "max_length": [0, "20"],
        "min_length": [-3],
        "stop_strings": [3, [""]],
        "num_beams": [0],
        "early_stopping": ["always"],
        "length_penalty": ["1"],
        "typical_p": [0],
        "epsilon_cutoff": [1],
        "eta_cutoff": [-1],
        "sequence_bias": [{"(1, 2)": 1.0}, [[5], 1.0], 3],
        "bad_words_ids": [[3], [[]]],
        "suppress_tokens": [-1, [-1]],
        "begin_suppress_tokens": ["x"],
        "forced_bos_token_id": [[3], -1],
        "forced_eos_token_id": [-1],
        "exponential_decay_length_penalty": [3, [1, -1]],
        "renormalize_logits": [1],
        "guidance_scale": ["2", 1e39],
        "num_return_sequences": [0],
    }
    assert set(IN_FILES) <= set(wrong)
    for name in ("generation_config.json", "config.json"):
        for key, values in wrong.items():
            for value in values:
                files = {key: value}, None
                with pytest.raises(CheckpointError, match=rf"/{name}: {key} is .*; it must be .*=\"ignore\""):
                    read(tmp_path, *(files if name.startswith("g") else files[::-1]))
            assert read(tmp_path, {key: None}).values == {}
    assert GenerationDefaults.read(write(tmp_path, {"top_k": -1, "eos_token_id": 4}), "ignore").eos_token_ids == (4,)


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": 3}, (2,)),
        ({"eos_token_id": [2, 0]}, {"eos_token_id": 3}, (2, 0)),
        ({"eos_token_id": None}, {"eos_token_id": 3}, (3,)),
        ({"eos_token_id": []}, {"eos_token_id": 3}, ()),
        ({}, {"eos_token_id": [3]}, (3,)),
        (None, {"eos_token_id": 3}, (3,)),
        (None, {"eos_token_id": []}, ()),
        (None, {}, None),
        ({}, {}, None),
        (None, None, None),
    ],
)
def test_end_of_sequence_ids(tmp_path, generation, config, ids):
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps(value))
    if generation is not None and generation.get("eos_token_id") is None and ids:
        with pytest.warns(JdsiWarning, match="names no eos_token_id: that of config"):
            assert GenerationDefaults.read(tmp_path).eos_token_ids == ids
    else:
        assert GenerationDefaults.read(tmp_path).eos_token_ids == ids


@pytest.mark.parametrize("value", [True, -1, "2", 2.0, [2, None], [[2]], [True], [2, -1], {"a": 2}, 2**31], ids=repr)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_end_of_sequence_ids_that_are_none(tmp_path, name, value):
    (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=rf"{name}: eos_token_id is .*; it must be null, a token id or a list"):
        GenerationDefaults.read(tmp_path)


def test_tokens_outside_the_vocabulary_come_with_what_to_do(tmp_path):
    defaults = GenerationDefaults.read(write(tmp_path, {"suppress_tokens": [5, 999]}))
    defaults.check(1000)
    with pytest.raises(CheckpointError, match=r'generation_config.json: .*999.* \(generation_config="ignore" does'):
        defaults.check(300)


@pytest.mark.parametrize("text", [b"[]", b"{", b"\xff"])
def test_a_damaged_generation_config_is_named(tmp_path, text):
    (tmp_path / "generation_config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: "):
        GenerationDefaults.read(tmp_path)
