"""Train a small Llama on the Python standard library, on a CPU, in about an hour; export it for transformers.

    python examples/train_tiny_lm.py --minutes 60 --output examples/tiny-python-lm

The model is this project's `Transformer`; only the optimizer (optax) and the tokenizer trainer (tokenizers) are
borrowed. Ctrl-C stops early: what has been learned until then is saved and exported.
"""

import argparse
import ast
import dataclasses
import json
import math
import platform
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers, muon
from python_corpus import HELD_OUT_PERCENT, Document, read_corpus, to_json
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jdsi.converters import export_huggingface
from jdsi.kv_cache import PackedContext
from jdsi.models import Transformer, TransformerSpec
from jdsi.models import parameters as parameters_of
from jdsi.models.families import family_for

BOS, EOS = "<s>", "</s>"
Parameters = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides the data and the time given.

    Attributes:
        vocab_size: entries of the byte-level BPE vocabulary, the two special tokens included.
        width, layers, heads, kv_heads, head_dim, feed_forward: the shape of the model.
        windows: `(progress, length)`: from that part of the run on, training windows have `length` tokens. Short ones
            come first because attention is cheaper there; the last length is the one the model promises to handle.
        tokens_per_step: batch size; a multiple of every window length.
        muon_rate: peak learning rate of the matrices (Muon).
        adam_rate: peak learning rate of the embedding and the norms (Adam).
        weight_decay: decoupled decay of the matrices, multiplied by their learning rate.
        warmup: the part of the run, by progress, in which the learning rates rise from zero.
        cut_rate: how often a text is cut before a word and both sides tokenized on their own, per word boundary. It
            teaches the model prompts that end in a space (`"def "`), which whole texts never contain as tokens.
        seed: of the initial weights and of the order of the data.
    """

    vocab_size: int = 2048
    width: int = 192
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    feed_forward: int = 512
    windows: tuple[tuple[float, int], ...] = ((0.0, 256), (0.3, 512), (0.6, 1024))
    tokens_per_step: int = 4096
    muon_rate: float = 0.02
    adam_rate: float = 0.005
    weight_decay: float = 0.05
    warmup: float = 0.02
    cut_rate: float = 0.01
    seed: int = 0

    @property
    def context(self) -> int:
        """The longest sequence the model is trained on."""
        return self.windows[-1][1]

    def llama_config(self) -> Any:
        """The `LlamaConfig` that goes into `config.json`."""
        from transformers import LlamaConfig

        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=self.vocab_size,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.feed_forward,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=0,
            eos_token_id=1,
            dtype="bfloat16",
        )

    def spec(self) -> TransformerSpec:
        """The same model as this project's data."""
        return family_for("llama").spec(self.llama_config())

    def factor(self, progress: float) -> float:
        """What the peak learning rates are multiplied by: up during the warm-up, then down to zero at the end."""
        return max(0.0, min(progress / self.warmup if self.warmup else 1.0, (1 - progress) / (1 - self.warmup)))

    def window(self, progress: float) -> int:
        """The length of the training windows."""
        return [length for since, length in self.windows if progress >= since][-1]


# ---------------------------------------------------------------------------------------------------------------- data


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: every text is representable and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def cut(text: str, rate: float, rng: np.random.Generator) -> list[str]:
    """Cuts `text` before words, each boundary with probability `rate`; the pieces concatenate to `text`."""
    places = np.asarray([match.end() for match in re.finditer(r"\s(?=\S)", text)], np.int64)
    chosen = places[rng.random(len(places)) < rate].tolist()
    return [text[a:b] for a, b in zip([0, *chosen], [*chosen, len(text)], strict=True) if a < b]


def encode(tokenizer: Tokenizer, document: Document, rate: float, rng: np.random.Generator) -> list[int]:
    """The document's tokens between the two special ones."""
    pieces = tokenizer.encode_batch(cut(document.text, rate, rng), add_special_tokens=False)
    return [0, *(i for piece in pieces for i in piece.ids), 1]


@dataclasses.dataclass(frozen=True)
class Batch:
    """`rows` windows laid end to end on one axis of T tokens; targets below zero are not trained on."""

    tokens: Int[np.ndarray, " T"]
    targets: Int[np.ndarray, " T"]
    positions: Int[np.ndarray, " T"]
    segments: Int[np.ndarray, " T"]
    lengths: Int[np.ndarray, " T"]
    rows: int


def pack(windows: Int[np.ndarray, "B S+1"]) -> Batch:
    """Next-token prediction on windows of a token stream, each document in them a sequence of its own."""
    tokens, following = windows[:, :-1], windows[:, 1:]
    rows, length = tokens.shape
    starts = tokens == 0
    starts[:, 0] = True
    segments = np.cumsum(starts.reshape(-1)) - 1
    counts = np.bincount(segments)
    first = np.cumsum(counts) - counts
    return Batch(
        tokens=tokens.reshape(-1).astype(np.int32),
        targets=np.where(following == 0, -1, following).reshape(-1).astype(np.int32),
        positions=(np.arange(rows * length) - first[segments]).astype(np.int32),
        segments=segments.astype(np.int32),
        lengths=counts[segments].astype(np.int32),
        rows=rows,
    )


def batches(
    documents: Sequence[Document], tokenizer: Tokenizer, length: int, recipe: Recipe, rng: np.random.Generator
) -> Iterator[Batch]:
    """Windows of `length` tokens without end: each pass shuffles the files, cuts them anew and shifts the windows."""
    rows = recipe.tokens_per_step // length
    waiting = np.zeros((0, length + 1), np.int64)
    while True:
        order = rng.permutation(len(documents))
        stream = np.concatenate([encode(tokenizer, documents[i], recipe.cut_rate, rng) for i in order])
        stream = stream[rng.integers(length) % max(1, len(stream) - length) :]
        starts = np.arange(0, len(stream) - length, length)
        starts = rng.permutation(starts)
        waiting = np.concatenate([waiting, stream[starts[:, None] + np.arange(length + 1)]])
        while len(waiting) >= rows:
            yield pack(waiting[:rows])
            waiting = waiting[rows:]


# --------------------------------------------------------------------------------------------------------------- model


def initial_parameters(spec: TransformerSpec, seed: int) -> Parameters:
    """Random weights whose blocks start as the identity: what each adds to the residual stream begins at zero."""
    from flax import nnx

    values = {}
    for name, value in parameters_of(Transformer(spec, rngs=nnx.Rngs(seed))).items():
        if name.endswith(("attention.out.weight", "feed_forward.down.weight")):
            value = jnp.zeros_like(value)
        elif value.ndim == 2 and not name.startswith("embedding"):
            value = value * (0.5 / (0.02 * math.sqrt(value.shape[1])))
        values[name] = value
    return values


def token_losses(spec: TransformerSpec, values: Parameters, batch: dict[str, Array], rows: int) -> Float[Array, " T"]:
    """Cross-entropy of each target in nats, zero where there is no target."""
    model = Transformer.from_parameters(spec, values)
    context = PackedContext(batch["positions"], batch["segments"], batch["lengths"], rows=rows)
    hidden, _ = model.forward(batch["tokens"], context)
    targets = batch["targets"]
    losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), jnp.maximum(targets, 0))
    return jnp.where(targets >= 0, losses, 0.0)


def arrays(batch: Batch) -> dict[str, np.ndarray]:
    """What the compiled functions take of a batch."""
    return {name: getattr(batch, name) for name in ("tokens", "targets", "positions", "segments", "lengths")}


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Muon for the matrices inside the blocks, Adam for the embedding and the norms, both at their peak rates."""

    def matrices(values: Parameters) -> dict[str, MuonDimensionNumbers | None]:
        shape = MuonDimensionNumbers(reduction_axis=1, output_axis=0)  # weights are [out, in]
        inside = ("qkv.weight", "out.weight", "up.weight", "down.weight")
        return {name: shape if name.endswith(inside) else None for name in values}

    optimizer = muon(
        recipe.muon_rate,
        adam_learning_rate=recipe.adam_rate,
        weight_decay=recipe.weight_decay,
        adam_b2=0.98,
        muon_weight_dimension_numbers=matrices,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


def make_step(spec: TransformerSpec, optimizer: optax.GradientTransformation) -> Callable[..., tuple[Any, Any, Array]]:
    """The compiled training step: `(values, optimizer state, batch, factor, rows) -> (values, state, mean loss)`."""

    @partial(jax.jit, static_argnames="rows", donate_argnums=(0, 1))
    def step(values: Parameters, state: Any, batch: dict[str, Array], factor: Array, rows: int) -> tuple:
        def mean_loss(values: Parameters) -> Array:
            return token_losses(spec, values, batch, rows).sum() / jnp.maximum((batch["targets"] >= 0).sum(), 1)

        loss, gradients = jax.value_and_grad(mean_loss)(values)
        updates, state = optimizer.update(gradients, state, values)
        # The schedule follows the clock, which only the host knows, so it multiplies the updates from outside.
        values = optax.apply_updates(values, jax.tree.map(lambda update: factor * update, updates))
        return values, state, loss

    return step


# ------------------------------------------------------------------------------------------------------------ training


@dataclasses.dataclass
class Run:
    """A training run that can be stopped and taken up again.

    Attributes:
        values: the weights, float32.
        state: the optimizer's.
        steps, seconds, tokens: done so far; seconds count training only.
        curve: `[seconds, tokens, training loss in nats per token, held-out loss or None]` now and then.
    """

    values: Parameters
    state: Any
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    curve: list[list[float | None]] = dataclasses.field(default_factory=list)

    def save(self, path: Path) -> None:
        """Writes the run beside `path` first, so that a crash leaves the last good file."""
        tensors = {f"value {name}": np.asarray(value) for name, value in self.values.items()}
        tensors |= {f"state {i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self.state))}
        record = json.dumps([self.steps, self.seconds, self.tokens, self.curve])
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, record=np.asarray(record), **tensors)
        part.replace(path)

    @classmethod
    def load(cls, path: Path, optimizer: optax.GradientTransformation) -> "Run":
        """Takes up a run saved by `save` with the same recipe."""
        with np.load(path) as file:
            values = {n.removeprefix("value "): jnp.asarray(file[n]) for n in file.files if n.startswith("value ")}
            structure = jax.tree.structure(optimizer.init(values))
            leaves = [jnp.asarray(file[f"state {i}"]) for i in range(structure.num_leaves)]
            steps, seconds, tokens, curve = json.loads(str(file["record"]))
        return cls(values, jax.tree.unflatten(structure, leaves), steps, seconds, tokens, curve)


def train(
    run: Run,
    recipe: Recipe,
    tokenizer: Tokenizer,
    training: Sequence[Document],
    held_out: Sequence[Document],
    *,
    minutes: float | None = None,
    steps: int | None = None,
    checkpoint: Path | None = None,
    stop: threading.Event | None = None,
    reports: int = 40,
) -> None:
    """Trains until `minutes` of training or `steps` steps are done; `run` is updated in place.

    Args:
        stop: ends the training after the current step once it is set.
        checkpoint: where to save the run every two minutes.
        reports: how many points of the loss curve to keep and print.
    """
    spec, optimizer = recipe.spec(), make_optimizer(recipe)
    step = make_step(spec, optimizer)
    score = jax.jit(partial(token_losses, spec), static_argnames="rows")
    no_rng = np.random.default_rng(0)
    ids = np.concatenate([encode(tokenizer, document, 0.0, no_rng) for document in held_out])
    starts = np.linspace(0, max(0, len(ids) - recipe.context - 1), 12).astype(int)
    windows = np.stack([np.resize(ids[s : s + recipe.context + 1], recipe.context + 1) for s in starts])
    sample = pack(windows)
    length, source, recent = 0, iter(()), []
    saved = time.monotonic()
    while True:
        progress = run.steps / steps if steps is not None else run.seconds / (60 * (minutes or 1))
        if progress >= 1 or (stop is not None and stop.is_set()):
            break
        began = time.monotonic()
        if length != recipe.window(progress):
            length = recipe.window(progress)
            source = batches(training, tokenizer, length, recipe, np.random.default_rng((recipe.seed, run.steps)))
        batch = next(source)
        factor = np.float32(recipe.factor(progress))
        run.values, run.state, loss = step(run.values, run.state, arrays(batch), factor, rows=batch.rows)
        recent.append(float(loss))
        run.steps += 1
        run.tokens += len(batch.tokens)
        run.seconds += time.monotonic() - began
        if progress * reports >= len(run.curve):
            losses = score(run.values, arrays(sample), rows=sample.rows)
            outside = float(losses.sum() / (sample.targets >= 0).sum())
            run.curve.append([round(run.seconds), run.tokens, round(float(np.mean(recent)), 3), round(outside, 3)])
            print(
                f"{progress:5.1%}  step {run.steps}  {run.tokens / run.seconds:.0f} tokens/s  window {length}  "
                f"loss {np.mean(recent):.3f}  held out {outside:.3f}",
                flush=True,
            )
            recent.clear()
        if checkpoint is not None and time.monotonic() - saved > 120:
            run.save(checkpoint)
            saved = time.monotonic()
    if checkpoint is not None:
        run.save(checkpoint)


def bits_per_byte(
    spec: TransformerSpec, values: Parameters, tokenizer: Tokenizer, documents: Sequence[Document], context: int
) -> float:
    """Bits that the model needs for the documents' text, over its bytes in UTF-8.

    Each document is scored on its own, from the first token on, in windows of `context` tokens that overlap by half:
    a token is scored once, with everything before it in its document or at least half a context.
    """
    score = jax.jit(partial(token_losses, spec), static_argnames="rows")
    rng = np.random.default_rng(0)
    stride = context // 2
    nats = 0.0
    for document in documents:
        ids = np.asarray(encode(tokenizer, document, 0.0, rng)[:-1])
        done = 1  # the first token is the document's start
        while done < len(ids):
            begin = 0 if done == 1 else done - stride
            window = np.zeros(context + 1, np.int64)
            window[: len(ids[begin : begin + context + 1])] = ids[begin : begin + context + 1]
            batch = pack(window[None])
            losses = np.asarray(score(values, arrays(batch), rows=1), np.float64)
            stop = min(len(ids), begin + context + 1)
            nats += losses[done - begin - 1 : stop - begin - 1].sum()
            done = stop
    return nats / math.log(2) / sum(len(document.text.encode()) for document in documents)


# -------------------------------------------------------------------------------------------------------------- export


def rounded(values: Parameters) -> Parameters:
    """The weights as bfloat16 can hold them, in float32."""
    return {
        name: jnp.asarray(np.asarray(v).astype(ml_dtypes.bfloat16).astype(np.float32)) for name, v in values.items()
    }


def export(recipe: Recipe, values: Parameters, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a folder that transformers and this project load: config, weights in bfloat16, tokenizer."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    model, config = Transformer.from_parameters(recipe.spec(), values), recipe.llama_config().to_diff_dict()
    with tempfile.TemporaryDirectory(dir=folder) as fresh:  # the exporter wants a folder of its own
        written = export_huggingface(model, config, Path(fresh) / "model", dtype="bfloat16")
        for file in written.iterdir():
            file.replace(folder / file.name)
    GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="training time; the schedule ends there (60)")
    parser.add_argument("--steps", type=int, help="train this many steps instead, whatever they take")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the data (0)")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder to export to; until the run is finished, checkpoint.npz lies there too",
    )
    parser.add_argument("--resume", action="store_true", help="take up the run that was stopped there")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help=f"change the recipe: {Recipe(seed=0)}"
    )
    options = parser.parse_args(arguments)
    changes = {name: ast.literal_eval(value) for name, value in (item.split("=") for item in options.set)}
    recipe = dataclasses.replace(Recipe(seed=options.seed), **changes)

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    options.output.mkdir(parents=True, exist_ok=True)
    training, held_out = read_corpus()
    tokenizer = train_tokenizer([document.text for document in training], recipe.vocab_size)
    size = sum(len(d.text.encode()) for d in training)
    outside = sum(len(d.text.encode()) for d in held_out)
    print(f"{len(training)} files, {size / 1e6:.2f} MB; held out {len(held_out)} files, {outside / 1e3:.0f} kB")

    optimizer = make_optimizer(recipe)
    checkpoint = options.output / "checkpoint.npz"
    if options.resume:
        run = Run.load(checkpoint, optimizer)
    else:
        values = initial_parameters(recipe.spec(), recipe.seed)
        run = Run(values, optimizer.init(values))
    count = sum(v.size for v in run.values.values())
    print(f"{count / 1e6:.2f} M parameters")
    train(
        run,
        recipe,
        tokenizer,
        training,
        held_out,
        minutes=options.minutes,
        steps=options.steps,
        checkpoint=checkpoint,
        stop=stop,
    )
    values = rounded(run.values)
    export(recipe, values, tokenizer, options.output)
    score = bits_per_byte(recipe.spec(), values, tokenizer, held_out, recipe.context)
    print(f"held out: {score:.4f} bits per byte after {run.steps} steps, {run.tokens} tokens, {run.seconds:.0f} s")
    record = {
        "recipe": dataclasses.asdict(recipe),
        "parameters": count,
        "python": platform.python_version(),
        "files": {"training": len(training), "held_out": len(held_out), "held_out_percent": HELD_OUT_PERCENT},
        "bytes": {"training": size, "held_out": outside},
        "steps": run.steps,
        "tokens": run.tokens,
        "seconds": round(run.seconds, 1),
        "held_out_bits_per_byte": round(score, 4),
        "curve_columns": ["seconds", "tokens", "training loss (nats/token)", "held-out loss (nats/token, sample)"],
        "curve": run.curve,
    }
    (options.output / "training.json").write_text(to_json(record))
    if not stop.is_set():
        checkpoint.unlink()


if __name__ == "__main__":
    main()
