"""The engine against transformers, and against itself in other configurations."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models

import jdsi
from checkpoints import save_llama, save_script
from jdsi import CapacityError, ConfigError, PromptError, SamplingParams
from jdsi.runtime import ResidentExecutor, enable_compilation_cache
from without_torch import WITHOUT_TORCH

PROMPTS = ["def f(", "The quick brown fox jumps over the lazy", "x", "return café"]


def torch_tokens(model: transformers.PreTrainedModel, prompt: list[int], **options: object) -> list[int]:
    with torch.no_grad():
        out = model.generate(torch.tensor([prompt]), pad_token_id=0, **options)
    return out[0, len(prompt) :].tolist()


def test_greedy_equals_transformers_for_a_ragged_batch(
    engine: jdsi.InferenceEngine, torch_model: transformers.PreTrainedModel
) -> None:
    completions = engine.generate(PROMPTS, SamplingParams(max_new_tokens=24))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = engine.tokenizer(prompt)["input_ids"]
        expected = torch_tokens(torch_model, ids, max_new_tokens=24, do_sample=False)
        assert completion.token_ids == expected
        assert completion.finish_reason == ("stop" if expected[-1] == 0 else "length")
        assert completion.text == engine.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("early_stopping", [False, True])
def test_beam_search_equals_transformers(
    engine: jdsi.InferenceEngine, torch_model: transformers.PreTrainedModel, early_stopping: bool
) -> None:
    params = SamplingParams(max_new_tokens=10, num_beams=3, early_stopping=early_stopping)
    for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        ids = engine.tokenizer(prompt)["input_ids"]
        options = {"max_new_tokens": 10, "do_sample": False, "num_beams": 3, "early_stopping": early_stopping}
        assert completion.token_ids == torch_tokens(torch_model, ids, **options)


def test_a_request_does_not_depend_on_its_batch(engine: jdsi.InferenceEngine) -> None:
    params = [
        SamplingParams(max_new_tokens=16, temperature=1.0, seed=1, top_p=0.9),
        SamplingParams(max_new_tokens=9, repetition_penalty=1.3, no_repeat_ngram=2),
        SamplingParams(max_new_tokens=12, temperature=0.7, seed=3, top_k=20, min_p=0.02, logprobs=2),
        SamplingParams(max_new_tokens=5, frequency_penalty=0.5, ignore_eos=True),
    ]
    together = engine.generate(PROMPTS, params)
    alone = [engine.generate(p, s)[0] for p, s in zip(PROMPTS, params, strict=True)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.text for c in together] == [c.text for c in alone]


def test_batches_beyond_the_limit_are_split(folder: Path, engine: jdsi.InferenceEngine) -> None:
    small = jdsi.init_inference(folder, max_batch_size=2)
    params = SamplingParams(max_new_tokens=6)
    expected = [c.token_ids for c in engine.generate(PROMPTS, params)]
    assert [c.token_ids for c in small.generate(PROMPTS, params)] == expected
    assert small.stats.new_tokens == sum(map(len, expected))


def test_stream_joins_to_generate(engine: jdsi.InferenceEngine) -> None:
    params = SamplingParams(max_new_tokens=20, temperature=1.0, seed=5)
    events = list(engine.stream(PROMPTS, params))
    for i, completion in enumerate(engine.generate(PROMPTS, params)):
        mine = [e for e in events if e.index == i]
        assert "".join(e.text for e in mine) == completion.text
        assert [e.token_id for e in mine] == completion.token_ids
        assert mine[-1].completion == completion


def test_a_stop_string_ends_the_text_before_it(engine: jdsi.InferenceEngine) -> None:
    whole = engine.generate("def f(", SamplingParams(max_new_tokens=24, ignore_eos=True))[0]
    stop = whole.text[4:6]
    assert stop
    cut = engine.generate("def f(", SamplingParams(max_new_tokens=24, ignore_eos=True, stop=(stop,)))[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < 24


def test_text_goes_on_inside_a_character_and_stops_at_a_byte(tmp_path: Path) -> None:
    vocabulary = {"</s>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    inner = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    text = "x€é😀\n!"
    tokens = [byte + 1 for byte in text.encode()]
    save_script(tmp_path, tokens)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    engine = jdsi.init_inference(tmp_path, tokenizer=tokenizer)
    events = list(engine.stream(tokens[:2], SamplingParams(max_new_tokens=20, stop="\n")))
    assert [event.text for event in events if event.text] == list("€é😀")
    completion = events[-1].completion
    assert completion == jdsi.Completion("€é😀", tokens[2 : tokens.index(ord("\n") + 1) + 1], "stop")
    assert engine.generate(tokens[:2], SamplingParams(max_new_tokens=20)) == [
        jdsi.Completion("€é😀\n!", [*tokens[2:], 0], "stop")
    ]


def test_stop_ids_and_min_new_tokens(engine: jdsi.InferenceEngine) -> None:
    free = engine.generate("x", SamplingParams(max_new_tokens=8, ignore_eos=True))[0].token_ids
    stopped = engine.generate("x", SamplingParams(max_new_tokens=8, ignore_eos=True, stop_token_ids=(free[2],)))[0]
    assert stopped.token_ids == free[: free.index(free[2]) + 1]
    held = SamplingParams(max_new_tokens=8, min_new_tokens=8, ignore_eos=True, stop_token_ids=(free[2],))
    assert len(engine.generate("x", held)[0].token_ids) == 8


def test_logprobs_are_the_models(engine: jdsi.InferenceEngine) -> None:
    prompt = engine.tokenizer("def f(")["input_ids"]
    completion = engine.generate(prompt, SamplingParams(max_new_tokens=5, logprobs=3, ignore_eos=True))[0]
    logits = engine.forward([prompt + completion.token_ids])[0]
    expected = jax.nn.log_softmax(logits)[len(prompt) - 1 : -1]
    assert completion.logprobs is not None
    for row, token in zip(np.asarray(expected), completion.logprobs, strict=True):
        assert token.logprob == pytest.approx(row[token.token_id], abs=1e-4)
        assert [i for i, _ in token.top] == np.argsort(-row)[:3].tolist()


def test_prompts_may_be_text_ids_arrays_or_chat(engine: jdsi.InferenceEngine) -> None:
    params = SamplingParams(max_new_tokens=4)
    ids = engine.tokenizer("def f(")["input_ids"]
    expected = engine.generate("def f(", params)
    assert engine.generate(ids, params) == expected
    assert engine.generate(np.array(ids), params) == expected
    assert engine.generate([ids, "x"], params)[0] == expected[0]
    chat = [{"role": "user", "content": "hi"}]
    rendered = "<|user|>hi</s><|assistant|>"
    assert engine.generate(chat, params) == engine.generate(rendered, params)
    assert engine.generate([chat, chat], params) == engine.generate(rendered, params) * 2
    both = engine.generate([jdsi.Chat(chat), jdsi.Chat(chat, add_generation_prompt=False)], params)
    assert both == engine.generate([rendered, "<|user|>hi</s>"], params)


def test_forward_equals_transformers(engine: jdsi.InferenceEngine, torch_model: transformers.PreTrainedModel) -> None:
    rows = [[5, 9, 2, 7, 7, 1], [3, 3], [250] * 17]
    logits = engine.forward(rows)
    assert logits.shape == (3, 17, 300)
    for row, ours in zip(rows, logits, strict=True):
        with torch.no_grad():
            expected = torch_model(torch.tensor([row])).logits[0].numpy()
        np.testing.assert_allclose(ours[: len(row)], expected, rtol=5e-4, atol=5e-5)


def test_load_model_is_differentiable_and_plain_jit(folder: Path, torch_model: transformers.PreTrainedModel) -> None:
    from flax import nnx

    model = jdsi.load_model(folder)
    tokens = jnp.asarray([[5, 9, 2, 7, 7, 1, 40, 8]])
    graph, state = nnx.split(model)

    def loss(state: nnx.State) -> jax.Array:
        logp = jax.nn.log_softmax(nnx.merge(graph, state)(tokens)[:, :-1])
        return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(state)
    torch_tokens = torch.tensor(np.asarray(tokens), dtype=torch.long)
    expected = torch_model(torch_tokens, labels=torch_tokens).loss
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-4)
    ours = gradient["layers"][1]["feed_forward"]["down"]["weight"][...]
    theirs = torch_model.model.layers[1].mlp.down_proj.weight.grad.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    torch_model.zero_grad()


def test_bfloat16_is_close_to_float32(folder: Path, engine: jdsi.InferenceEngine) -> None:
    rows = [[5, 9, 2, 7, 7, 1]]
    exact = np.asarray(engine.forward(rows), np.float64)
    narrow = np.asarray(jdsi.init_inference(folder, dtype="bfloat16").forward(rows), np.float64)
    assert np.linalg.norm(narrow - exact) <= 2e-2 * np.linalg.norm(exact)


def test_warmup_leaves_nothing_to_compile(folder: Path) -> None:
    engine = jdsi.init_inference(folder)
    assert engine.warmup(batch_sizes=(1, 2), prompt_lengths=(3,), progress=False) == 2
    with jax.log_compiles(False):
        before = engine._executor._step._cache_size()
        engine.generate(["x", "def f("], SamplingParams())
        assert engine._executor._step._cache_size() == before


@pytest.mark.parametrize(
    ("prompts", "sampling", "error", "message"),
    [
        ("", None, PromptError, "empty"),
        ([], None, PromptError, "no prompt"),
        ([[]], None, PromptError, "empty"),
        ([5, 300], None, PromptError, "token id 300; the vocabulary is 0 to 299"),
        ([5, -1], None, PromptError, "token id -1"),
        ([5, 2.5], None, PromptError, "must be text"),
        (5, None, PromptError, "int"),
        (b"def", None, PromptError, "bytes"),
        ("x", {"max_new_tokens": 4}, ConfigError, "SamplingParams"),
        ("x", SamplingParams(num_beams=65), ConfigError, "num_beams=65"),
        ([{"role": "user"}], None, PromptError, "'content'"),
        ("x", SamplingParams(max_new_tokens=256), CapacityError, "257, more than the 256"),
        (["x", "y"], [SamplingParams()], ConfigError, "1 sampling parameters for 2 prompts"),
        ("x", SamplingParams(stop_token_ids=(300,)), ConfigError, "vocabulary"),
    ],
)
def test_bad_requests_are_named(
    engine: jdsi.InferenceEngine, prompts: object, sampling: object, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        engine.generate(prompts, sampling)
    assert engine.generate("x", SamplingParams(max_new_tokens=1))  # and the engine still works


@pytest.mark.parametrize(
    ("tokens", "lengths", "error"),
    [
        ([5, 9], None, PromptError),
        (["text"], None, PromptError),
        ([[1, 2]], [[1]], ConfigError),
        ([[1] * 257], None, CapacityError),
        ([[1, 2]], [3], ConfigError),
        ([], None, PromptError),
        ([[]], None, PromptError),
    ],
)
def test_bad_forward_arguments_are_named(
    engine: jdsi.InferenceEngine, tokens: object, lengths: object, error: type
) -> None:
    with pytest.raises(error):
        engine.forward(tokens, lengths)


def test_broken_weights_are_an_error_not_garbage(tmp_path: Path) -> None:
    model = save_llama(tmp_path)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    with pytest.warns(jdsi.converters.NonFiniteWarning, match=r"model\.norm\.weight"):
        engine = jdsi.init_inference(tmp_path)
    with pytest.raises(jdsi.JdsiError, match="not finite"):
        engine.generate("x")


def test_abandoned_stream_leaves_the_engine_usable(engine: jdsi.InferenceEngine) -> None:
    params = SamplingParams(max_new_tokens=16, ignore_eos=True)
    expected = engine.generate(PROMPTS, params)
    stream = engine.stream(PROMPTS, params)
    next(stream)
    stream.close()
    assert engine.generate(PROMPTS, params) == expected


def test_a_stream_that_is_left_at_exit_ends_without_a_word(folder: Path) -> None:
    """Kept by a module that outlives those of JAX."""
    code = f"""
import threading
import jdsi

params = jdsi.SamplingParams(max_new_tokens=200, ignore_eos=True)
streamed = dict(offload="nvme", memory_limit="400.4MiB")
engines = [jdsi.init_inference({str(folder)!r}, **more) for more in ({{}}, streamed)]
assert engines[1].executor.stream_report() is not None
threading.kept = [engine.stream("x", params) for engine in engines]
for stream in threading.kept:
    next(stream), next(stream)
"""
    command, env = [sys.executable, "-c", WITHOUT_TORCH + code], os.environ | {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    done = subprocess.run(command, capture_output=True, timeout=300, check=False, env=env)
    assert (done.returncode, done.stderr) == (0, b"")


def test_stream_checks_its_arguments_at_the_call(engine: jdsi.InferenceEngine) -> None:
    for params in (SamplingParams(stop_token_ids=(300,)), SamplingParams(logprobs=301), SamplingParams(num_beams=2)):
        with pytest.raises(ConfigError):
            engine.stream("x", params)


def test_a_module_and_its_folder_end_sequences_alike(folder: Path, engine: jdsi.InferenceEngine) -> None:
    from_module = jdsi.init_inference(jdsi.load_model(folder), tokenizer=folder)
    assert from_module.eos_token_ids == engine.eos_token_ids == (0,)
    assert jdsi.init_inference(folder, eos_token_ids=(7, 9)).eos_token_ids == (7, 9)


def test_what_padding_holds_never_reaches_a_real_token(tmp_path: Path) -> None:
    model = save_llama(tmp_path)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = float("nan")  # id 0 is what prompts are padded with
    model.save_pretrained(tmp_path)
    with pytest.warns(jdsi.converters.NonFiniteWarning):
        engine = jdsi.init_inference(tmp_path)
    params = SamplingParams(max_new_tokens=6, ignore_eos=True, stop_token_ids=())
    prompts = [[5, 9, 2], [7] * 11]
    together = engine.generate(prompts, params)
    assert [c.token_ids for c in together] == [engine.generate(p, params)[0].token_ids for p in prompts]
    assert np.isfinite(engine.forward(prompts)[0, :3]).all()
    with pytest.warns(jdsi.converters.NonFiniteWarning):
        model = jdsi.load_model(tmp_path)
    logits = model(jnp.asarray([[5, 9, 2, 0, 0]]), jnp.asarray([3]))
    assert np.isfinite(logits[0, :3]).all()


def test_rotary_models_may_go_past_their_trained_length(tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = save_llama(tmp_path, max_position_embeddings=32, rope_parameters=scaling)
    with pytest.raises(CapacityError, match="more than the 32"):
        jdsi.init_inference(tmp_path).generate([[5] * 20], SamplingParams(max_new_tokens=30))
    engine = jdsi.init_inference(tmp_path, max_tokens=128)
    prompt = [5, 9, 2, 7] * 5
    ours = engine.generate([prompt], SamplingParams(max_new_tokens=30, ignore_eos=True))[0].token_ids
    assert ours == torch_tokens(model, prompt, max_new_tokens=30, do_sample=False, eos_token_id=None)


def test_a_learned_position_table_is_a_limit(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=16, n_head=2, n_layer=1, n_positions=24, vocab_size=50, eos_token_id=None)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="24 positions"):
        jdsi.init_inference(tmp_path, max_tokens=25)
    with pytest.raises(CapacityError, match="24 positions"):
        jdsi.load_model(tmp_path)(jnp.zeros((1, 25), jnp.int32))
    engine = jdsi.init_inference(tmp_path)
    assert len(engine.generate([[5] * 20])[0].token_ids) == 4  # the default number of tokens is what fits


def test_another_way_to_sample_compiles_no_model(folder: Path) -> None:
    engine = jdsi.init_inference(folder)
    executor = engine.executor
    assert isinstance(executor, ResidentExecutor)

    def programs(**way: Any) -> int:
        engine.generate("x", SamplingParams(max_new_tokens=3, ignore_eos=True, **way))
        return executor._step._cache_size()

    greedy, sampled = programs(), programs(temperature=0.7)
    assert greedy < sampled
    assert programs(temperature=1.0, top_k=5, logprobs=2) == programs(no_repeat_ngram=2) == sampled


def test_statistics_count_beams_and_closed_streams(engine: jdsi.InferenceEngine) -> None:
    engine.generate("x", SamplingParams(max_new_tokens=4, num_beams=2, ignore_eos=True))
    assert engine.stats.new_tokens == 4
    assert engine.stats.first_token_seconds > 0
    stream = engine.stream("x", SamplingParams(max_new_tokens=9, ignore_eos=True))
    for _ in range(3):
        next(stream)
    other = engine.stream("xy", SamplingParams(max_new_tokens=9, ignore_eos=True))
    next(other)
    assert (stream.stats.new_tokens, other.stats.new_tokens) == (3, 1)  # each counts for itself
    assert engine.stats is other.stats
    other.close()
    next(stream)
    stream.close()
    assert stream.stats.new_tokens == 4
    assert stream.stats.decode_seconds > 0


def test_a_model_is_needed(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no model"):
        jdsi.init_inference()
    with pytest.raises(ConfigError, match="int"):
        jdsi.init_inference(3)
    assert jdsi.init_inference(config={"checkpoint": str(folder)}).spec.family == "llama"


def test_the_compilation_cache_goes_where_it_is_told(folder: Path, tmp_path: Path) -> None:
    before = jax.config.jax_compilation_cache_dir
    try:
        for name in ("first", "second"):
            engine = jdsi.init_inference(folder, compilation_cache=tmp_path / name)
            engine.generate([[5, 9]], SamplingParams(max_new_tokens=3 if name == "first" else 2))
            assert any((tmp_path / name).iterdir())
    finally:
        enable_compilation_cache(before)
