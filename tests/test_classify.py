"""Sequence classifiers and poolers through the engine, against transformers run one text at a time."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import jdsi
from jdsi.converters.block_store import BlockStore
from jdsi.runtime import compilation_counts
from jdsi.runtime.residency import Residency
from jdsi.runtime.streamed import StreamedExecutor
from zoo import save_as

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXTS = ["a good film .", ("a film", "bad b c d e ."), "ax", ("good", "good"), "a b c d e f g h a b c d e f g h a b"]
ROWS = [[5, 9, 2, 7], [11, 4, 4, 60, 33, 21, 8, 9, 10, 70, 71, 72], [3], [8, 8, 8, 0], [70] * 17]
RTOL, ATOL = 5e-4, 5e-5


def expected(model: Any, inputs: list[dict[str, Any]], key: str = "logits") -> np.ndarray:
    """What transformers gives for each input."""
    with torch.no_grad():
        rows = [model(**{k: torch.tensor([v]) for k, v in one.items()})[key][0] for one in inputs]
    return torch.stack(rows).numpy()


def logits(engine: jdsi.InferenceEngine, texts: Any, token_types: Any = None) -> np.ndarray:
    return np.stack([one.logits for one in engine.classify(texts, token_types)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classifier")


@pytest.fixture(scope="module")
def torch_model(folder: Path) -> Any:
    labels = {0: "bad", 1: "good", 2: "neither"}
    return save_as(transformers.AutoModelForSequenceClassification, "bert", folder, id2label=labels)


@pytest.fixture(scope="module")
def engine(folder: Path, torch_model: Any) -> jdsi.InferenceEngine:
    return jdsi.init_inference(folder, dtype="float32", max_batch_size=3)


@pytest.mark.parity
def test_texts_pairs_and_token_ids(folder: Path, torch_model: Any, engine: jdsi.InferenceEngine) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = [dict(tokenizer(*((t,) if isinstance(t, str) else t))) for t in TEXTS]
    assert any(any(one["token_type_ids"]) for one in inputs)
    wanted = expected(torch_model, inputs)
    found = engine.classify(TEXTS)
    assert engine.stats.prompt_tokens == sum(len(one["input_ids"]) for one in inputs)
    for one, row in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.logits, row, rtol=RTOL, atol=ATOL)
        np.testing.assert_allclose(one.scores, torch.tensor(row).softmax(0), rtol=RTOL, atol=ATOL)
        assert (one.scores.dtype, one.logits.dtype) == (np.float32, np.float32)
        assert one.labels == ("bad", "good", "neither")
        assert one.label == torch_model.config.id2label[int(row.argmax())]
        assert one.score == one.scores.max()
    for text, row in zip(TEXTS, wanted, strict=True):  # alone; a tuple is a pair
        np.testing.assert_allclose(logits(engine, text), [row], rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(logits(engine, ["a film", "bad b c d e ."])[0], logits(engine, "a film")[0], rtol=1e-5)
    ids, types = ([one[key] for one in inputs] for key in ("input_ids", "token_type_ids"))
    np.testing.assert_allclose(logits(engine, ids, types), wanted, rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(logits(engine, ids[1], types[1]), wanted[1:2], rtol=RTOL, atol=ATOL)
    assert not np.allclose(logits(engine, ids)[1], wanted[1], rtol=1e-2)
    np.testing.assert_allclose(logits(engine, np.array(ids[1:2])), logits(engine, ids)[1:2], rtol=RTOL, atol=ATOL)


@pytest.mark.parity
def test_a_module_says_what_its_folder_says(folder: Path, torch_model: Any, engine: jdsi.InferenceEngine) -> None:
    module = jdsi.init_inference(jdsi.load_model(folder, dtype="float32"))
    for own, other in zip(module.classify(ROWS), engine.classify(ROWS), strict=True):
        assert (own.label, own.labels) == (other.label, other.labels)
        np.testing.assert_allclose(own.scores, other.scores, rtol=RTOL, atol=ATOL)
    hidden = engine.forward(ROWS)
    assert hidden.shape[2] == module.spec.width
    with torch.no_grad():
        wanted = torch_model.bert(torch.tensor(ROWS[:1])).last_hidden_state[0]
    np.testing.assert_allclose(hidden[0, :4], wanted, rtol=RTOL, atol=ATOL)


@pytest.mark.parity
def test_a_bare_encoder_pools(tmp_path: Path) -> None:
    model = save_as(transformers.AutoModel, "bert", tmp_path)
    for options in ({}, {"tensor_parallel": 2, "pipeline_parallel": 2}, {"offload": "nvme"}):
        with contextlib.closing(jdsi.init_inference(tmp_path, dtype="float32", **options)) as engine:
            wanted = expected(model, [{"input_ids": row} for row in ROWS], "pooler_output")
            np.testing.assert_allclose(engine.pool(ROWS), wanted, rtol=RTOL, atol=ATOL)
            assert engine.pool("a film").shape == (1, engine.spec.width)
    with pytest.raises(jdsi.ConfigError, match=r"not a sequence classifier; use pool\(\)"):
        engine.classify(ROWS)


MESHES = (
    {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True},
    {"data_parallel": 2, "pipeline_parallel": 2},
)


@pytest.mark.parity
def test_meshes(folder: Path, torch_model: Any, tmp_path: Path) -> None:
    reward = save_as(transformers.AutoModelForSequenceClassification, "llama", tmp_path / "reward", num_labels=1)
    pre_training = save_as(transformers.AutoModelForPreTraining, "bert", tmp_path / "pre-training")
    types = [[i % 2 for i in range(len(row))] for row in ROWS]
    plain = [{"input_ids": row} for row in ROWS]
    typed = [one | {"token_type_ids": kinds} for one, kinds in zip(plain, types, strict=True)]
    for path, given, wanted in (
        (folder, types, expected(torch_model, typed)),
        (tmp_path / "reward", None, expected(reward, plain)),
        (tmp_path / "pre-training", types, expected(pre_training, typed, "seq_relationship_logits")),
    ):
        for degrees in MESHES:
            engine = jdsi.init_inference(path, dtype="float32", max_batch_size=4, **degrees)
            found = logits(engine, ROWS, given)
            np.testing.assert_allclose(found, wanted, rtol=RTOL, atol=ATOL, err_msg=f"{path.name} {degrees}")


def streamed(folder: Path, *last: str, **options: Any) -> jdsi.InferenceEngine:
    """All is read for every pass but the classifier, and the head where it is not in `last`."""
    store = BlockStore.open(folder)
    order = ("embedding", *(name for name in store.blocks if name.startswith("layers.")), *last)
    residency = Residency(frozenset(store.blocks) - set(order), order, slots=2, nbytes=0)
    executor = StreamedExecutor(store, residency, dtype="float32", **options)
    return jdsi.InferenceEngine(executor, jdsi.InferenceConfig(dtype="float32", max_batch_size=2))


@pytest.mark.parity
def test_streamed_weights_are_read_once_for_several_batches(folder: Path, torch_model: Any, tmp_path: Path) -> None:
    plain = [{"input_ids": row} for row in ROWS]
    wanted = expected(torch_model, plain)
    with contextlib.closing(streamed(folder, batches_per_pass=3)) as engine:
        np.testing.assert_allclose(logits(engine, ROWS), wanted, rtol=RTOL, atol=ATOL)
        assert engine.stats.stream is not None
        assert (engine.stats.stream.passes, engine.stats.stream.blocks >= 3) == (1, True)
    model = save_as(transformers.AutoModelForPreTraining, "bert", tmp_path)
    with contextlib.closing(streamed(tmp_path, "embedding")) as engine:  # the table comes twice, whichever head is used
        for _ in range(2):
            wanted = expected(model, plain, "seq_relationship_logits")
            np.testing.assert_allclose(logits(engine, ROWS), wanted, rtol=RTOL, atol=ATOL)
            wanted = expected(model, plain[1:2], "prediction_logits")
            np.testing.assert_allclose(engine.forward(ROWS[1:2]), wanted, rtol=RTOL, atol=ATOL)


def test_warmup_leaves_nothing_to_compile(folder: Path, torch_model: Any) -> None:
    engine = jdsi.init_inference(folder, dtype="float32")
    assert engine.warmup([1, 4], [5, 8, 20], progress=False) == 4
    before = compilation_counts()
    engine.classify(["a film", ("good", "bad"), "a", "b"])
    engine.classify("a b c d e f g h a b c d e f g h a b c d")
    assert compilation_counts() == before


@pytest.mark.parametrize(
    ("texts", "types", "error", "message"),
    [
        ([], None, jdsi.PromptError, "no text"),
        ("a " * 60, None, jdsi.CapacityError, "text has 62 tokens, more than the 48"),
        ([[5, 89]], None, jdsi.PromptError, "text has token id 89; the vocabulary is 0 to 88"),
        ([[5], []], None, jdsi.PromptError, "text 1 is empty"),
        (("a", "b", "c"), None, jdsi.PromptError, "text is a tuple of 3; a pair is a tuple of two texts"),
        ([("a", 5)], None, jdsi.PromptError, "a pair is a tuple of two texts"),
        (5, None, jdsi.PromptError, "the prompt is an int"),
        (["a"], [[0]], jdsi.ConfigError, "text is text, whose token types the tokenizer tells"),
        ([[5, 6]], [[0]], jdsi.ConfigError, "token_types has 1 ids for the 2 tokens of text"),
        ([[5, 6]], [[0, 2]], jdsi.ConfigError, "token types from 0 to 2; this model has types 0 to 1"),
        ([[5, 6]], [[0, 0], [0, 0]], jdsi.ConfigError, "token_types has 2 rows for 1 rows"),
        ([[5, 6]], [[0.5, 1.0]], jdsi.ConfigError, "token_types must have a row of integers"),
        ([[5, 6]], "xy", jdsi.ConfigError, "token_types must have a row of integers"),
        ([{"role": "user", "content": "a"}], None, jdsi.PromptError, "no chat template"),
    ],
)
def test_bad_texts_are_named(engine: jdsi.InferenceEngine, texts: Any, types: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        engine.classify(texts, types)


def test_other_models_say_what_to_call(engine: jdsi.InferenceEngine, tmp_path: Path) -> None:
    with pytest.raises(jdsi.ConfigError, match=r"cannot generate; use classify\(\)"):
        engine.generate("a film")
    with pytest.raises(jdsi.ConfigError, match=r"no pooler alone; use classify\(\)"):
        engine.pool("a film")
    save_as(transformers.AutoModelForCausalLM, "llama", tmp_path / "llama")
    with pytest.raises(jdsi.ConfigError, match=r"this llama model is not a sequence classifier; use generate\(\)"):
        jdsi.init_inference(tmp_path / "llama").classify(ROWS)
    save_as(transformers.AutoModelForMaskedLM, "roberta", tmp_path / "masked")
    with pytest.raises(jdsi.ConfigError, match=r"not a sequence classifier; use forward\(\)"):
        jdsi.init_inference(tmp_path / "masked").classify(ROWS)


def test_chats_are_rendered_without_an_answer_to_come(tmp_path: Path) -> None:
    save_as(transformers.AutoModelForSequenceClassification, "bert", tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}h{% endif %}"
    )
    engine = jdsi.init_inference(tmp_path, dtype="float32", tokenizer=tokenizer)
    chat = [{"role": "user", "content": "good"}, {"role": "assistant", "content": " film"}]
    wanted = logits(engine, tokenizer(["good film", "good filmh"], add_special_tokens=False)["input_ids"])
    given = [chat, jdsi.Chat(chat), jdsi.Chat(chat, add_generation_prompt=True)]
    np.testing.assert_allclose(logits(engine, given), wanted[[0, 0, 1]], rtol=RTOL, atol=ATOL)


def test_padding_that_a_model_gives_no_position_is_refused(tmp_path: Path) -> None:
    model = save_as(transformers.AutoModelForSequenceClassification, "roberta", tmp_path)
    engine = jdsi.init_inference(tmp_path, dtype="float32")
    wanted = expected(model, [{"input_ids": [5, 9, 0, 7]}])
    np.testing.assert_allclose(logits(engine, [[5, 9, 0, 7]]), wanted, rtol=RTOL, atol=ATOL)
    with pytest.raises(jdsi.PromptError, match=r"text 1 has the padding id 1 at 2, .*; leave padding out"):
        engine.classify([[5], [5, 9, 1, 7]])


def test_broken_weights_are_an_error(tmp_path: Path) -> None:
    model = save_as(transformers.AutoModelForSequenceClassification, "bert", tmp_path)
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    with pytest.warns(jdsi.converters.NonFiniteWarning):
        engine = jdsi.init_inference(tmp_path)
    with pytest.raises(jdsi.JdsiError, match=r"text 0, 1 is not finite"):
        engine.classify(["a", "b"])


def test_what_is_said_of_generation_has_no_effect(tmp_path: Path) -> None:
    save_as(transformers.AutoModelForSequenceClassification, "bert", tmp_path)
    for asked in ({"temperature": "hot"}, {"suppress_tokens": [999]}, {"eos_token_id": "2"}):
        (tmp_path / "generation_config.json").write_text(json.dumps(asked))
        engine = jdsi.init_inference(tmp_path)
        assert (engine.eos_token_ids, engine.generation_defaults.values) == ((), {})
