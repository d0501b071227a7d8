"""Random damage to the small files of a checkpoint folder, and what transformers and we make of it.

    python tests/folder_fuzz.py COUNT [SEED [FIRST]]

tries so many, from number FIRST on, and prints every disagreement.
"""

import contextlib
import copy
import dataclasses
import functools
import io
import json
import random
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

import zoo
from checkpoints import save_tokenizer
from jdsi import InferenceConfig, InferenceEngine, SamplingParams
from jdsi.converters import load_model
from jdsi.errors import JdsiError, JdsiWarning
from jdsi.generation.defaults import GenerationDefaults
from jdsi.generation.tokenizer import load_tokenizer
from jdsi.models import Transformer, TransformerSpec, parameters
from jdsi.runtime import ResidentExecutor

FAMILIES = ("llama", "gpt2", "mistral", "qwen2", "phi3", "gemma2", "gpt_neox", "falcon", "opt", "bert")
TOKENS = [[5, 9, 2, 7, 11, 4, 4, 60, 33, 21, 8, 9]]
TEXT = "def f(x):\n    return naïve 🙂"
SMALL = ("config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json")

_WRONG: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 1e30, -0.5, 0.5, 1e-9, float("nan"), "", "1", "x", "auto", "linear",
    [], [1], ["x"], {}, {"x": 1}, "5", 12, 40, 48, 64,
)  # fmt: skip


def paths(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where everything in a JSON value lies."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*above, key)
        yield from paths(child, (*above, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def mutate(content: Any, rng: random.Random) -> tuple[str, Any]:
    """One change, in words and done."""
    content = copy.deepcopy(content)
    places = list(paths(content))
    if not places:
        return "nothing", content
    # Long tables of the same kind (a vocabulary) count as much as one entry.
    place = rng.choice([p for p in places if len(p) <= rng.randint(1, 4)] or places)
    holder, key = _at(content, place[:-1]), place[-1]
    dictionaries = [(), *(p for p in places if isinstance(_at(content, p), dict))]
    kind = rng.choice(["remove", "wrong", "wrong", "wrong", "move", "copy", "add"])
    if kind == "remove":
        del holder[key]
        return f"remove {place}", content
    if kind == "wrong":
        value = rng.choice(_WRONG)
        if isinstance(holder[key], int | float) and rng.random() < 0.4:
            own = holder[key]
            value = rng.choice([own + 1, own * 2, own // 2, str(own), float(own)])
        holder[key] = value
        return f"{place} = {value!r}", content
    target = rng.choice(dictionaries)
    if kind == "add":
        name = rng.choice(_KNOWN)
        value = rng.choice(_WRONG)
        _at(content, target)[name] = value
        return f"add {(*target, name)} = {value!r}", content
    value = copy.deepcopy(holder[key])
    if kind == "move":
        del holder[key]
    with contextlib.suppress(KeyError, TypeError, IndexError):
        _at(content, target)[str(key)] = value
    return f"{kind} {place} to {target}", content


_KNOWN = (
    "rope_scaling", "rope_theta", "rope_parameters", "original_max_position_embeddings", "tie_word_embeddings",
    "attention_bias", "mlp_bias", "head_dim", "sliding_window", "use_sliding_window", "layer_types",
    "partial_rotary_factor", "hidden_act", "activation_function", "num_key_value_heads", "is_decoder",
    "is_causal", "eos_token_id", "bos_token_id", "pad_token_id", "dtype", "torch_dtype", "architectures",
    "auto_map", "quantization_config", "transformers_weights", "scale_attn_weights", "final_logit_softcapping",
    "attn_logit_softcapping", "query_pre_attn_scalar", "attention_dropout", "max_position_embeddings",
    "add_cross_attention", "tokenizer_class", "max_window_layers", "num_labels", "id2label",
    "is_encoder_decoder", "pruned_heads", "chunk_size_feed_forward", "output_hidden_states", "return_dict",
    "use_cache", "add_bos_token", "add_prefix_space", "model_max_length", "chat_template",
    "clean_up_tokenization_spaces",
)  # fmt: skip


_GENERATION: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0, 1.7, 0.4, 0, "1.5"),
    "no_repeat_ngram_size": (0, 1, 2, -1, 2.0),
    "suppress_tokens": ([], [3, 5, 60], [1], 7, [-1], [10**6]),
    "begin_suppress_tokens": ([3, 5, 60, 33], [], "x"),
    "bad_words_ids": ([[5], [9, 2]], [[33]], [[]], [5]),
    "sequence_bias": ([[[5], 3.0], [[9, 2], -2.0]],),
    "forced_bos_token_id": (5, None, "5"),
    "forced_eos_token_id": (1, [1, 3], -1),
    "min_new_tokens": (0, 3, 9, -2, 2.5),
    "min_length": (0, 14, 30),
    "max_length": (13, 15, 40, 12, 5, 0, "20"),
    "max_new_tokens": (1, 3, 0, "3"),
    "num_beams": (1, 2, 3, 0),
    "length_penalty": (1.0, 0.0, 2.0, -1.0),
    "early_stopping": (True, False, "never", "x"),
    "num_return_sequences": (1, 2),
    "do_sample": (True, False, 1),
    "temperature": (0.7, 0.0, 1.0, -1),
    "top_k": (0, 3, 50),
    "top_p": (0.9, 1.0, 0.0),
    "typical_p": (0.9, 1.0),
    "exponential_decay_length_penalty": ([2, 1.3], [2], None),
    "renormalize_logits": (True, False),
    "eos_token_id": (1, [1, 60], None, 3),
    "guidance_scale": (1.0, 1.5),
    "penalty_alpha": (0.6,),
    "num_beam_groups": (1, 2),
    "use_cache": (False, True),
    "top_h": (0.4,),
}  # fmt: skip


def generation_options(rng: random.Random) -> dict[str, Any]:
    """A few options of a `generation_config.json`."""
    return {key: rng.choice(_GENERATION[key]) for key in rng.sample(sorted(_GENERATION), rng.randint(1, 3))}


# Keys that transformers stumbles over and that no logits depend on: of the index, what to return beside the logits, how
# to compute them, and windows of families that have none, which its caches ask for.
_UNREAD = ("metadata", "output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward")
_WITHOUT_WINDOWS = ("llama", "gpt2", "gpt_neox", "falcon", "opt", "bert")


@dataclasses.dataclass
class Outcome:
    """What came of a folder: `refused` says why there is nothing else, `named` that a warning says what is not done."""

    logits: np.ndarray | None = None
    generated: list[int] | None = None
    named: bool = False
    ids: list[int] | None = None
    text: str | None = None
    refused: str | None = None
    crashed: bool = False


def theirs(folder: Path, name: str, *, generate: bool = False) -> Outcome:
    """Of transformers, in float32; weights that it would make up count as refused."""
    out = Outcome()
    try:
        model, info = zoo.auto_class(name).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
        )
        if missing := [key for key in info["missing_keys"] if "pooler" not in key]:
            raise ValueError(f"missing {missing}")
        with torch.no_grad():
            out.logits = model.eval()(torch.tensor(TOKENS)).logits[0].numpy()
            if generate:
                prompt = torch.tensor(TOKENS)
                found = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0)
                out.generated = found[0, len(TOKENS[0]) :].tolist()
    except BaseException as error:
        out.refused = f"{type(error).__name__}: {str(error)[:200]}"
    return out


@functools.lru_cache(maxsize=64)
def _program(spec: TransformerSpec) -> Callable[..., jax.Array]:
    return jax.jit(lambda arrays, tokens: Transformer.from_parameters(spec, arrays)(tokens))


@functools.lru_cache(maxsize=len(FAMILIES))
def _executor(name: str, spec: TransformerSpec, folder: Path) -> ResidentExecutor:
    """Of a valid checkpoint, so that what is compiled serves all that differ in what they ask of generation."""
    return ResidentExecutor(load_model(folder, dtype="float32"))


def ours(folder: Path, valid: Path | None = None) -> Outcome:
    """Of jdsi; anything but its own errors is a crash. Generates with the weights of `valid`, if given."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", JdsiWarning)
        out = _ours(folder, valid)
    out.named = any(issubclass(warning.category, JdsiWarning) for warning in told)
    return out


def _ours(folder: Path, valid: Path | None) -> Outcome:
    out = Outcome()
    try:
        defaults = GenerationDefaults.read(folder)
        model = load_model(folder, dtype="float32")
        out.logits = np.asarray(_program(model.spec)(parameters(model), np.array(TOKENS)))[0]
        if valid is not None:
            executor = _executor(valid.name, model.spec, valid)
            ends = defaults.eos_token_ids or ()
            engine = InferenceEngine(executor, InferenceConfig(), eos_token_ids=ends, generation_defaults=defaults)
            room = {} if defaults.max_length or "max_new_tokens" in defaults.values else {"max_new_tokens": 20}
            out.generated = engine.generate(TOKENS, SamplingParams(temperature=0, **room))[0].token_ids
    except JdsiError as error:
        out.refused = str(error)
    except BaseException:
        out.refused, out.crashed = traceback.format_exc(limit=-3), True
    return out


def tokenizer_of(load: Callable[[], Any]) -> Outcome:
    """A tokenizer's ids and text."""
    out = Outcome()
    try:
        tokenizer = load()
        if tokenizer is None:
            raise JdsiError("none")
        out.ids = list(tokenizer(TEXT)["input_ids"])
        out.text = tokenizer.decode(out.ids[:9])
    except JdsiError as error:
        out.refused = str(error)
    except BaseException as error:
        out.refused, out.crashed = f"{type(error).__name__}: {str(error)[:300]}", True
    return out


def judge(folder: Path, name: str, change: str, valid: Path | None = None) -> str | None:
    """What we do that we must not; `None` if all is well. With `valid`, what is generated is compared as well."""
    found = ours(folder, valid)
    if found.crashed:
        return f"crash: {found.refused}"
    # What we refuse may be too much for transformers as well: layers without number, for one.
    right = theirs(folder, name, generate=valid is not None) if found.refused is None else Outcome()
    unread = any(key in change for key in _UNREAD) or (name in _WITHOUT_WINDOWS and "sliding_window" in change)
    if found.refused is None and right.refused is not None and not found.named and not unread:
        return f"we answer, transformers refuses: {right.refused}"
    if found.logits is not None and right.logits is not None:
        if found.logits.shape != right.logits.shape:
            return f"shapes {found.logits.shape} and {right.logits.shape}"
        if not np.allclose(found.logits, right.logits, rtol=1e-3, atol=1e-4, equal_nan=True):
            return f"another answer, by {np.abs(found.logits - right.logits).max()}"
    generated = found.generated is not None and right.generated is not None
    if generated and found.generated != right.generated and not found.named:
        return f"other tokens: {found.generated}, and {right.generated} of transformers"
    if found.refused is not None and "\n" in found.refused and "does not fit the model" not in found.refused:
        return f"more than a line: {found.refused}"
    token = tokenizer_of(lambda: load_tokenizer(folder))
    right = tokenizer_of(lambda: transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    if token.crashed and not right.crashed:
        return f"crash of the tokenizer: {token.refused}"
    if token.refused is None and (token.ids, token.text) != (right.ids, right.text):
        return f"other tokens: {token} {right}"
    return None


def folders(root: Path) -> dict[str, Path]:
    """A valid checkpoint of each family; half of them sharded."""
    made = {}
    for i, name in enumerate(FAMILIES):
        model = zoo.save(name, root / name, tie_word_embeddings=i % 3 == 1)
        if i % 2:
            (root / name / "model.safetensors").unlink()
            model.save_pretrained(root / name, max_shard_size="20KB")
        save_tokenizer(root / name)
        made[name] = root / name
    return made


@dataclasses.dataclass(frozen=True)
class Finding:
    """A disagreement."""

    seed: int
    change: str
    what: str


def run(count: int, seed: int, root: Path, first: int = 0) -> list[Finding]:
    """Tries `count` mutations."""
    valid, found = folders(root / "valid"), []
    for i in range(first, first + count):
        rng = random.Random(f"{seed}-{i}")
        name = rng.choice(FAMILIES)
        folder = root / "mutated"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(valid[name], folder)
        file = folder / rng.choice([f for f in SMALL if (folder / f).exists()])
        change, content = mutate(json.loads(file.read_text()), rng)
        asks = file.name == "generation_config.json" and name not in zoo.ENCODERS and rng.random() < 0.7
        if asks:
            options = generation_options(rng)
            content = json.loads(file.read_text()) | options
            change = str(options)
        if not asks and rng.random() < 0.2:
            more, content = mutate(content, rng)
            change += f"; {more}"
        text = json.dumps(content)
        if rng.random() < 0.03:
            change, text = "cut", text[: rng.randrange(len(text))]
        file.write_text(text)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            warnings.simplefilter("ignore", JdsiWarning)
            what = judge(folder, name, change, valid[name] if asks else None)
        if what is not None:
            found.append(Finding(i, f"{name} {file.name}: {change}", what))
            print(found[-1], flush=True)
    return found


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as place:
        # What asks for more than a machine has is to fail where it asks.
        resource.setrlimit(resource.RLIMIT_AS, (14 << 30, 14 << 30))
        count, seed, first = (int(text) for text in (*sys.argv[1:], "0", "0")[:3])
        result = run(count, seed, Path(place), first)
    print(f"{len(result)} disagreements")
