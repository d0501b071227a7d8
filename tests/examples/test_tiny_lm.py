"""The script that trains the embedded checkpoint, its n-gram baseline, and the checkpoint itself."""

import ast
import dataclasses
import importlib
import itertools
import json
import math
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jdsi
from parity import ATOL, RTOL

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COMMITTED = EXAMPLES / "tiny-python-lm"

# Written for this test, so that no model was trained on it; scored from its first byte.
UNSEEN = '''\
"""Keep the last readings of a sensor and answer questions about them."""

import collections
import statistics


class Readings:
    """A bounded window of numbers, oldest first."""

    def __init__(self, size=100):
        if size < 1:
            raise ValueError("size must be at least 1, not %r" % size)
        self._values = collections.deque(maxlen=size)

    def add(self, value):
        """Append a value; the oldest one is dropped when the window is full."""
        self._values.append(float(value))

    def __len__(self):
        return len(self._values)

    def mean(self):
        """Return the average, or None if there are no values yet."""
        if not self._values:
            return None
        return statistics.fmean(self._values)

    def above(self, limit):
        """Return a list of the values that are greater than limit."""
        return [value for value in self._values if value > limit]


def main(path):
    readings = Readings()
    with open(path, encoding="utf-8") as file:
        for line in file:
            line = line.strip()
            if line and not line.startswith("#"):
                readings.add(line)
    print("%d values, mean %s" % (len(readings), readings.mean()))


if __name__ == "__main__":
    import sys
    main(sys.argv[1])
'''


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """`train_tiny_lm`, which imports its neighbours from its own folder as it does when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("train_tiny_lm")


@pytest.fixture(scope="module")
def baseline(script: ModuleType) -> ModuleType:
    """`ngram_baseline`, importable once `script` has put its folder on the path."""
    return importlib.import_module("ngram_baseline")


@pytest.fixture(scope="module")
def corpus(script: ModuleType) -> ModuleType:
    """`python_corpus`."""
    return importlib.import_module("python_corpus")


@pytest.fixture(scope="module")
def tiny(script: ModuleType) -> object:
    """A recipe that trains in seconds."""
    return dataclasses.replace(
        script.Recipe(),
        vocab_size=300,
        width=24,
        layers=2,
        head_dim=8,
        feed_forward=40,
        windows=((0.0, 32), (0.5, 64)),
        tokens_per_step=256,
        cut_rate=0.2,
    )


def documents(corpus: ModuleType, count: int = 6) -> list:
    lines = UNSEEN.splitlines(keepends=True)
    return [corpus.Document(f"{i}.py", "".join(lines[i:] + lines[:i])) for i in range(count)]


def torch_model(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def check_logits(folder: Path, ids: np.ndarray) -> None:
    """Our logits and those of transformers agree, in float32, on one row of tokens."""
    model = jdsi.load_model(folder, dtype="float32")
    ours = jax.jit(lambda tokens: model(tokens))(jnp.asarray(ids)[None])[0]
    with torch.no_grad():
        theirs = torch_model(folder)(torch.asarray(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(ours, theirs, rtol=RTOL, atol=ATOL)


# The script


def test_corpus_is_split_by_name_alone(corpus: ModuleType, tmp_path: Path) -> None:
    names = [f"package{i}/module.py" for i in range(200)]
    for name in [*names, "test/skipped.py", "package0/tests/skipped.py", "package0/readme.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    training, held_out = corpus.read_corpus(tmp_path)
    assert sorted(d.name for d in training + held_out) == sorted(names)
    assert {d.name for d in held_out} == {name for name in names if corpus.is_held_out(name)}
    assert 0 < len(held_out) < 20


def test_cuts_keep_the_text_and_tokens_decode_to_it(script: ModuleType, corpus: ModuleType) -> None:
    tokenizer = script.train_tokenizer([UNSEEN], 300)
    text = UNSEEN + "\tnaïve 🙂\r\n\x00 end  "
    pieces = script.cut(text, 0.3, np.random.default_rng(0))
    assert len(pieces) > 10
    assert "".join(pieces) == text
    assert any(piece.endswith("def ") for piece in pieces)
    ids = script.encode(tokenizer, corpus.Document("a.py", text), 0.3, np.random.default_rng(0))
    assert (ids[0], ids[-1]) == (0, 1)
    assert tokenizer.decode(ids) == text


def test_windows_hold_every_token_once_and_keep_documents_apart(
    script: ModuleType, corpus: ModuleType, tiny: object
) -> None:
    tokenizer = script.train_tokenizer([UNSEEN], 300)
    batch = next(script.batches(documents(corpus), tokenizer, 64, tiny, np.random.default_rng(0)))
    assert batch.rows == 4
    for i in range(len(batch.tokens)):
        new = i % 64 == 0 or batch.tokens[i] == 0
        assert batch.positions[i] == (0 if new else batch.positions[i - 1] + 1)
        assert new == (i == 0 or batch.segments[i] != batch.segments[i - 1])
        assert (batch.targets[i] < 0) == (batch.tokens[i] == 1)  # nothing follows a document's end
        if i % 64 != 63 and batch.targets[i] >= 0:
            assert batch.targets[i] == batch.tokens[i + 1]
    np.testing.assert_array_equal(np.bincount(batch.segments)[batch.segments], batch.lengths)


def test_a_short_run_learns_stops_resumes_and_exports(
    script: ModuleType, corpus: ModuleType, tiny: object, tmp_path: Path
) -> None:
    files = documents(corpus)
    tokenizer = script.train_tokenizer([d.text for d in files], 300)
    optimizer = script.make_optimizer(tiny)
    values = script.initial_parameters(tiny.spec(), 0)
    run = script.Run(values, optimizer.init(values))
    path = tmp_path / "checkpoint.npz"
    stop = threading.Event()
    stop.set()
    script.train(run, tiny, tokenizer, files, files, steps=12, checkpoint=path, stop=stop)
    assert run.steps == 0
    resumed = script.Run.load(path, optimizer)
    jax.tree.map(np.testing.assert_array_equal, (run.values, run.state), (resumed.values, resumed.state))
    script.train(resumed, tiny, tokenizer, files, files, steps=12, checkpoint=path)
    assert (resumed.steps, resumed.tokens) == (12, 12 * 256)
    first, last = resumed.curve[0], resumed.curve[-1]
    assert last[3] < first[3] - 0.5
    values = script.rounded(resumed.values)
    script.export(tiny, values, tokenizer, tmp_path / "model")
    ids = np.asarray(script.encode(tokenizer, files[0], 0.0, np.random.default_rng(0))[:64])
    check_logits(tmp_path / "model", ids)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded(files[0].text)["input_ids"][:64] == ids.tolist()
    assert loaded.decode(loaded(files[0].text)["input_ids"], skip_special_tokens=True) == files[0].text

    # Scored with overlapping windows: what one long window gives where that fits.
    short = [corpus.Document("short.py", UNSEEN[:72])]
    ids = np.asarray(script.encode(tokenizer, short[0], 0.0, np.random.default_rng(0))[:-1])
    logits = jdsi.load_model(tmp_path / "model", dtype="float32")(jnp.asarray(ids)[None])[0]
    nats = -jax.nn.log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]].sum()
    expected = float(nats) / math.log(2) / 72
    assert len(ids) <= 64
    assert script.bits_per_byte(tiny.spec(), values, tokenizer, short, 64) == pytest.approx(expected, rel=1e-5)
    assert script.bits_per_byte(tiny.spec(), values, tokenizer, short, 16) == pytest.approx(expected, rel=0.3)


def test_the_schedule_rises_falls_and_ends_at_zero(script: ModuleType) -> None:
    recipe = dataclasses.replace(script.Recipe(), warmup=0.1)
    assert recipe.factor(0.05) == pytest.approx(0.5)
    assert recipe.factor(0.1) == pytest.approx(1)
    assert recipe.factor(0.55) == pytest.approx(0.5)
    assert recipe.factor(1.2) == 0
    assert [recipe.window(p) for p in (0.0, 0.29, 0.3, 0.99)] == [256, 256, 512, 1024]


# The baseline


def test_kneser_ney_sums_to_one_and_agrees_with_a_count_by_hand(baseline: ModuleType) -> None:
    text = [[0, 1, 2, 0, 1, 3], [2, 0, 1, 2, 2]]
    model = baseline.KneserNey(text, 5, 3)
    for history in itertools.product(range(5), repeat=2):
        for scale in (0.8, 1.2):
            total = sum(model.probabilities([[*history, x]], scale)[-1][-1] for x in range(5))
            assert total == pytest.approx(1)
    # Order 1 of this model counts the different symbols before each: 0 after {start, 2}, 1 after {0}, 2 after
    # {1, start, 2}, 3 after {1}; 7 in all.
    d1, d2, d3 = model.orders[0].discounts
    freed = (2 * d1 + d2 + d3) / 7 / 5
    unigram = model.probabilities([[3], [4], [2]])[0]
    np.testing.assert_allclose(unigram, [(1 - d1) / 7 + freed, freed, (3 - d3) / 7 + freed])


def test_the_document_model_sums_to_one_and_learns(baseline: ModuleType) -> None:
    history = [0, 1, 2, 0, 1, 2, 0]
    uniform = np.full(len(history) + 1, 0.25)
    last = [baseline.with_document([[*history, x]], uniform, range(1, 4), 0.5, 1.0)[-1] for x in range(4)]
    assert sum(last) == pytest.approx(1)
    assert np.argmax(last) == 1


def test_every_baseline_is_measured(baseline: ModuleType, script: ModuleType, corpus: ModuleType) -> None:
    files = documents(corpus)
    tokenizer = script.train_tokenizer([UNSEEN], 300)
    results = baseline.measure(files[1:], files[:1], tokenizer, {"bytes": (3,), "tokens": (2, 3)})
    assert len(results) == 6
    assert results["zlib -9"] == 8 * len(zlib.compress(UNSEEN.encode(), 9)) / len(UNSEEN.encode())
    assert all(0 < value < 5 for value in results.values())


# The committed model


def test_committed_model_is_small_and_equals_transformers_at_full_length(script: ModuleType) -> None:
    assert sum(f.stat().st_size for f in COMMITTED.glob("*.safetensors")) <= 10_000_000
    tokenizer = transformers.AutoTokenizer.from_pretrained(COMMITTED)
    text = UNSEEN * 3
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.model_max_length == 1024 <= len(ids)
    check_logits(COMMITTED, np.asarray(ids[:1024]))


def test_committed_model_predicts_unseen_python(script: ModuleType, corpus: ModuleType) -> None:
    tokenizer = script.Tokenizer.from_file(str(COMMITTED / "tokenizer.json"))
    model = jdsi.load_model(COMMITTED, dtype="float32")
    score = script.bits_per_byte(
        model.spec, jdsi.models.parameters(model), tokenizer, [corpus.Document("unseen.py", UNSEEN)], 1024
    )
    squeezed = 8 * len(zlib.compress(UNSEEN.encode(), 9)) / len(UNSEEN.encode())
    assert score < 1.1 < squeezed


def test_committed_figures_hold_what_the_card_says() -> None:
    record = json.loads((COMMITTED / "training.json").read_text())
    card = (COMMITTED / "README.md").read_text()
    for value in (record["held_out_bits_per_byte"], *record["baselines"].values()):
        assert f"| {value:.3f} |" in card
    assert record["held_out_bits_per_byte"] < min(record["baselines"].values())
    assert record["curve"][-1][1] <= record["tokens"]


def longest_program(text: str) -> ast.Module:
    """The longest run of whole lines from the start of `text` that is valid Python."""
    lines = text.splitlines()[:-1]
    for count in range(len(lines), 0, -1):
        try:
            return ast.parse("\n".join(lines[:count]))
        except SyntaxError:
            continue
    raise AssertionError(text)


@pytest.mark.parametrize(("prompt", "kind"), [("def ", ast.FunctionDef), ("class ", ast.ClassDef)])
def test_committed_model_writes_python(prompt: str, kind: type) -> None:
    engine = jdsi.init_inference(COMMITTED)
    params = jdsi.SamplingParams(max_new_tokens=110, repetition_penalty=1.3)  # greedy
    program = longest_program(prompt + engine.generate(prompt, params)[0].text)
    definition = program.body[0]
    assert isinstance(definition, kind)
    assert ast.get_docstring(definition)
    assert len(definition.body) >= 2
