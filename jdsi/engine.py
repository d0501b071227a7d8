"""The inference engine: a model, its tokenizer, and `generate`."""

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jdsi.config import InferenceConfig
from jdsi.converters import load_model, resolve
from jdsi.errors import CapacityError, ConfigError, PromptError
from jdsi.generation import Completion, CompletionBuilder, FinishCode, SampledTokens, SamplingParams, TokenLogprob
from jdsi.generation.prompts import Prompt, as_list, encode
from jdsi.generation.tokenizer import load_eos_token_ids, load_tokenizer
from jdsi.models import Transformer, TransformerSpec, parameters
from jdsi.runtime import Executor, ResidentExecutor, batch_bucket, enable_compilation_cache, token_bucket
from jdsi.runtime.beam_decoding import beam_search
from jdsi.runtime.decoding import decode


@dataclasses.dataclass(frozen=True)
class StreamEvent:
    """One step of one request in `InferenceEngine.stream`.

    Attributes:
        index: which prompt.
        text: text that became certain; may be empty.
        token_id: the token.
        completion: the whole answer with the request's last event, else `None`.
    """

    index: int
    text: str
    token_id: int
    completion: Completion | None = None


@dataclasses.dataclass
class GenerationStats:
    """What the last `generate` or `stream` of an engine did. Times in seconds, compilation included.

    Attributes:
        prompt_tokens, new_tokens: over all requests.
        first_token_seconds: from the start of each batch to its first tokens, summed over batches.
        decode_seconds: from first tokens to last, summed.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the whole time."""
        seconds = self.first_token_seconds + self.decode_seconds
        return self.new_tokens / seconds if seconds else 0.0

    def as_dict(self) -> dict[str, float]:
        """All figures by name."""
        return {**dataclasses.asdict(self), "tokens_per_second": self.tokens_per_second}

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.prompt_tokens} prompt and {self.new_tokens} new tokens; first after "
            f"{self.first_token_seconds:.2f} s, then {self.decode_seconds:.2f} s"
        )


class InferenceEngine:
    """Generates with a model. Make one with `jdsi.init_inference`.

    Attributes:
        config: as given.
        spec: what the model is.
        tokenizer: a `transformers` tokenizer, or `None`.
        max_tokens: prompt plus generated tokens a sequence may have.
        eos_token_ids: ids that end a sequence.
        stats: of the last generation.
    """

    def __init__(
        self,
        executor: Executor,
        config: InferenceConfig,
        *,
        tokenizer: Any = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.eos_token_ids = tuple(eos_token_ids)
        self.stats = GenerationStats()
        self._executor = executor
        limit = executor.spec.max_positions
        self.max_tokens = config.max_tokens or limit
        if self.max_tokens > limit:
            raise ConfigError(f"max_tokens={self.max_tokens} exceeds the model's {limit} positions")

    @property
    def spec(self) -> TransformerSpec:
        """What the model is."""
        return self._executor.spec

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Continues prompts.

        Args:
            prompts: one or several, each text, token ids or chat messages.
            sampling: for all, or one for each; greedy by default.

        Returns:
            One completion per prompt, in order. A request's tokens do not depend on what it is batched with.

        Raises:
            PromptError: a prompt is empty, not understood, or has ids outside the vocabulary.
            CapacityError: prompt plus `max_new_tokens` exceeds `max_tokens`.
            ConfigError: the model cannot generate, or the sampling parameters do not fit.
        """
        ids, params = self._requests(prompts, sampling)
        done: dict[int, Completion] = {}
        beamed = [i for i, p in enumerate(params) if p.num_beams > 1]
        for rows in self._batches(beamed, ids, lambda i: params[i].num_beams):
            done.update(self._beam_search(rows, ids, params))
        sampled = [i for i, p in enumerate(params) if p.num_beams == 1]
        for event in self._sample(sampled, ids, params):
            if event.completion is not None:
                done[event.index] = event.completion
        return [done[i] for i in range(len(ids))]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[StreamEvent]:
        """Like `generate`, token by token. Arguments are checked at the call, not at the first event."""
        ids, params = self._requests(prompts, sampling)
        if any(p.num_beams > 1 for p in params):
            raise ConfigError("stream cannot run a beam search, which knows its text only at the end; use generate")
        return self._sample(list(range(len(ids))), ids, params)

    def forward(
        self,
        tokens: Int[Array, "B S"] | Sequence[Sequence[int]],
        lengths: Int[Array, " B"] | Sequence[int] | None = None,
        token_types: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S V"]:
        """Float32 logits of every token of a right-padded batch (hidden states if the model has no head).

        Args:
            tokens: ids; rows of unequal length are padded here.
            lengths: real tokens of each row; by default each row's own length.
            token_types: segment ids (BERT).
        """
        given: Sequence[Any] = np.asarray(tokens).tolist() if isinstance(tokens, Array | np.ndarray) else tokens
        rows = [encode(row, None, self.spec.vocab_size, name=f"row {i}") for i, row in enumerate(given)]
        if not rows:
            raise PromptError("forward needs at least one row of tokens")
        own = [len(row) for row in rows]
        width = max(own)
        if width > self.spec.max_positions:
            raise CapacityError(f"{width} tokens exceed the model's {self.spec.max_positions} positions")
        counts = np.asarray(own if lengths is None else lengths, np.int32)
        if counts.shape != (len(rows),) or (counts < 1).any() or (counts > own).any():
            raise ConfigError(f"lengths={counts.tolist()} must give each of the rows of {own} tokens 1 to all of them")
        bucket = min(token_bucket(width), self.spec.max_positions)
        padded = np.zeros((len(rows), bucket), np.int32)
        for line, row in zip(padded, rows, strict=True):
            line[: len(row)] = row
        types = None
        if token_types is not None:
            types = jnp.pad(jnp.asarray(token_types, jnp.int32), ((0, 0), (0, bucket - width)))
        return self._executor.logits(jnp.asarray(padded), jnp.asarray(counts), types)[:, :width]

    def warmup(
        self,
        batch_sizes: Sequence[int] = (1,),
        prompt_lengths: Sequence[int] = (16,),
        sampling: SamplingParams | None = None,
        *,
        progress: bool = True,
    ) -> int:
        """Compiles (or reads from the compilation cache) the programs for these shapes.

        Args:
            batch_sizes: numbers of prompts given at once.
            prompt_lengths: lengths of the longest prompt of a batch.
            sampling: which sampler features and how many new tokens; greedy by default.
            progress: show a bar.

        Returns:
            How many different shapes were run.
        """
        from rich.progress import track

        sampling = sampling or SamplingParams()
        shapes = sorted({(batch_bucket(b), token_bucket(n)) for b in batch_sizes for n in prompt_lengths})
        for batch, length in track(shapes, description="compiling", disable=not progress):
            prompt = [0] * max(1, min(length, self.max_tokens - sampling.max_new_tokens))
            _, params = self._requests([prompt] * batch, dataclasses.replace(sampling, ignore_eos=True, stop=()))
            if sampling.num_beams > 1:
                beam_search(self._executor, [prompt] * batch, params)
                continue
            steps = decode(self._executor, [prompt] * batch, params)
            for _, _ in zip(range(2), steps, strict=False):
                pass
        return len(shapes)

    def _requests(
        self, prompts: Any, sampling: SamplingParams | Sequence[SamplingParams] | None
    ) -> tuple[list[list[int]], list[SamplingParams]]:
        if not self.spec.causal or self.spec.head is None:
            what = "is an encoder" if not self.spec.causal else "has no language-model head"
            raise ConfigError(f"this {self.spec.family} model {what} and cannot generate; use forward()")
        items = as_list(prompts)
        if not items:
            raise PromptError("no prompt was given")
        if sampling is None or isinstance(sampling, SamplingParams):
            params = [sampling or SamplingParams()] * len(items)
        else:
            params = list(sampling)
        if len(params) != len(items):
            raise ConfigError(f"{len(params)} sampling parameters for {len(items)} prompts; give one, or one for each")
        ids = [
            encode(item, self.tokenizer, self.spec.vocab_size, name=f"prompt {i}" if len(items) > 1 else "prompt")
            for i, item in enumerate(items)
        ]
        for i, (prompt, p) in enumerate(zip(ids, params, strict=True)):
            if len(prompt) + p.max_new_tokens > self.max_tokens:
                raise CapacityError(
                    f"prompt {i} has {len(prompt)} tokens and max_new_tokens is {p.max_new_tokens}: together "
                    f"{len(prompt) + p.max_new_tokens}, more than the {self.max_tokens} this engine takes"
                )
        return ids, params

    def _batches(self, indices: list[int], ids: list[list[int]], group: Any = lambda i: 0) -> Iterator[list[int]]:
        """Batches of at most `max_batch_size` of one group, similar lengths together so that little is padding."""
        order = sorted(indices, key=lambda i: (group(i), len(ids[i])))
        while order:
            same = [i for i in order[: self.config.max_batch_size] if group(i) == group(order[0])]
            yield same
            order = order[len(same) :]

    def _beam_search(
        self, rows: list[int], ids: list[list[int]], params: list[SamplingParams]
    ) -> Iterator[tuple[int, Completion]]:
        found = beam_search(
            self._executor, [ids[i] for i in rows], [params[i] for i in rows], eos_token_ids=self.eos_token_ids
        )
        for i, hypotheses in zip(rows, found, strict=True):
            best = hypotheses[0]
            builder = CompletionBuilder(SamplingParams(), self.tokenizer, ids[i])
            for token in best.token_ids[:-1]:
                builder.add(token)
            builder.add(best.token_ids[-1], FinishCode.STOP if best.finish_reason == "stop" else FinishCode.LENGTH)
            yield i, builder.completion()

    def _sample(self, indices: list[int], ids: list[list[int]], params: list[SamplingParams]) -> Iterator[StreamEvent]:
        self.stats = stats = GenerationStats(prompt_tokens=sum(map(len, ids)))
        for rows in self._batches(indices, ids):
            builders = [CompletionBuilder(params[i], self.tokenizer, ids[i]) for i in rows]
            start = time.perf_counter()
            first = None
            steps = decode(
                self._executor, [ids[i] for i in rows], [params[i] for i in rows], eos_token_ids=self.eos_token_ids
            )
            for step in steps:
                if first is None:
                    first = time.perf_counter()
                    stats.first_token_seconds += first - start
                for row, (index, builder) in enumerate(zip(rows, builders, strict=True)):
                    if (not step.valid[row] and not step.finish[row]) or builder.finish_reason is not None:
                        continue
                    token = int(step.tokens[row])
                    delta = builder.add(token, int(step.finish[row]), _logprob(step, row))
                    stats.new_tokens += 1
                    done = builder.completion() if builder.finish_reason is not None else None
                    yield StreamEvent(index, delta, token, done)
                if all(b.finish_reason is not None for b in builders):
                    break
            stats.decode_seconds += time.perf_counter() - (first or start)


def _logprob(step: SampledTokens, row: int) -> TokenLogprob | None:
    if step.logprob is None:
        return None
    top: list[tuple[int, float]] = []
    if step.top_ids is not None and step.top_logprobs is not None:
        top = list(zip(step.top_ids[row].tolist(), step.top_logprobs[row].tolist(), strict=True))
    return TokenLogprob(int(step.tokens[row]), float(step.logprob[row]), top)


def init_inference(
    model: str | os.PathLike[str] | Transformer,
    config: InferenceConfig | Mapping[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    **overrides: Any,
) -> InferenceEngine:
    """An engine for a model.

    Args:
        model: a folder (Hugging Face or converted by `jdsi convert`), a hub id, or a `Transformer`.
        config: an `InferenceConfig`, or a mapping in our keys or DeepSpeed's.
        tokenizer: a tokenizer object, or where to load it from; by default the model's own.
        **overrides: single settings, over `config`.

    Raises:
        ConfigError, CheckpointError: naming what is wrong and what would be right.
    """
    if isinstance(config, InferenceConfig):
        config = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    settings = {**(config or {}), **overrides}
    parsed = InferenceConfig.from_dict(settings)
    if parsed.compilation_cache:
        enable_compilation_cache(None if parsed.compilation_cache is True else parsed.compilation_cache)
    chosen = tokenizer if tokenizer is not None else parsed.tokenizer
    if isinstance(chosen, str | os.PathLike):
        chosen = load_tokenizer(chosen, required=True)
    if isinstance(model, Transformer):
        loaded = model if parsed.dtype == "auto" else _cast(model, parsed.dtype)
        return InferenceEngine(ResidentExecutor(loaded), parsed, tokenizer=chosen)
    folder = resolve(model if isinstance(model, str) else Path(model))
    return InferenceEngine(
        ResidentExecutor(load_model(folder, dtype=parsed.dtype)),
        parsed,
        tokenizer=load_tokenizer(folder) if chosen is None else chosen,
        eos_token_ids=load_eos_token_ids(folder),
    )


def _cast(model: Transformer, dtype: str) -> Transformer:
    return Transformer.from_parameters(model.spec, jax.tree.map(lambda a: a.astype(dtype), parameters(model)))
