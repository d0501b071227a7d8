"""The inference engine: a model, its tokenizer, `generate` and `classify`."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from jdsi.config import InferenceConfig
from jdsi.converters import ParameterSource, Progress, load_spec, save_parameters
from jdsi.converters.fitting import same_but_for_ties
from jdsi.converters.save import Layout
from jdsi.errors import CapacityError, ConfigError
from jdsi.generation import Classification, Completion, SamplingParams, pad_rows
from jdsi.generation.classification import Text, TextIntake, TokenRow, check_finite
from jdsi.generation.defaults import GenerationDefaults
from jdsi.generation.prompts import Prompt, encode_rows
from jdsi.generation.requests import Intake, Request
from jdsi.models import TransformerSpec
from jdsi.runtime import Executor, GenerationStats, token_bucket
from jdsi.runtime.batching import most_requests
from jdsi.runtime.classification import classify
from jdsi.runtime.forward import forward
from jdsi.runtime.run import Measured, Run, Stream


class InferenceEngine:
    """Generates, or classifies, with a model. Make one with `jdsi.init_inference`.

    Attributes:
        config: as given.
        tokenizer: a `transformers` tokenizer, or `None`.
        max_tokens: prompt plus generated tokens a sequence may have.
        eos_token_ids: ids that end a sequence.
        generation_defaults: the values of sampling parameters that callers leave out.
        checkpoint: the folder that the model was loaded from, if it was.
        stats: of the generation or classification that began last; a stream has its own too.
    """

    def __init__(
        self,
        executor: Executor,
        config: InferenceConfig,
        *,
        tokenizer: Any = None,
        eos_token_ids: Sequence[int] = (),
        generation_defaults: GenerationDefaults | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.eos_token_ids = tuple(eos_token_ids)
        self.generation_defaults = generation_defaults or GenerationDefaults()
        self.generation_defaults.check(executor.spec.vocab_size)
        self.generation_defaults.warn()
        self.stats = GenerationStats()
        self._executor = executor
        self.max_tokens = config.max_tokens or executor.spec.max_positions
        table = executor.spec.position_table
        if table is not None and self.max_tokens > table:
            raise ConfigError(
                f"max_tokens={self.max_tokens} exceeds the {table} positions of the model's learned table"
            )

    @property
    def spec(self) -> TransformerSpec:
        """What the model is."""
        return self._executor.spec

    @property
    def executor(self) -> Executor:
        """What runs the model."""
        return self._executor

    def save(
        self,
        path: str | Path,
        *,
        to: Layout = "orbax",
        like: str | Path | None = None,
        tensor_parallel: int | None = None,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> Path:
        """Writes the weights as a checkpoint folder, plain and in the dtype they have here; any mesh can load it.

        Where several processes run the engine together, all make this call. Process 0 writes everything, and is sent
        one share of a parameter at a time.

        Args:
            path: the folder to make, in process 0; it appears only when it is complete and on disk.
            to: `"orbax"`, `"hf"`, `"streaming"` or `"sharded"`, see `jdsi.converters.save_parameters`.
            like: a checkpoint folder of the same model, whose config and tokenizer files go along; by default the one
                that the model was loaded from.
            tensor_parallel: the degree that `"sharded"` is cut for; by default the engine's own.
            max_shard_size, overwrite, progress: as for `save_parameters`.

        Returns:
            The folder.

        Raises:
            ConfigError: the model was in memory and `like` is not given, or that describes another model; an option is
                invalid, or differs between processes; the weights are offloaded.
            CheckpointError: the destination exists, cannot be written or is not apart from the source; the disk is
                full; parameters cannot be read.
            PeerError: a process is lost.
        """
        origin = self.checkpoint if like is None else like
        if to == "sharded" and tensor_parallel is None:
            tensor_parallel = self._executor.parallelism.tensor
        asked = {"to": to, "tensor_parallel": tensor_parallel, "max_shard_size": max_shard_size, "overwrite": overwrite}
        known = self.checkpoint is not None  # not where it is: machines may keep it in different places
        self._executor.agree({"call": "save", "path": str(path), "like": str(like), "checkpoint": known, **asked})
        if origin is None:
            raise ConfigError("this model was in memory, with no config to go along; give like=, a folder of the same")

        def write(source: ParameterSource) -> None:
            if not same_but_for_ties(load_spec(origin), self.spec):
                raise ConfigError(f"{origin}: its config describes another model than the {self.spec.family} to save")
            save_parameters(source, path, like=origin, progress=progress, **asked)

        self._executor.with_parameters(write)
        return Path(path)

    def close(self) -> None:
        """Ends the background work of an engine whose weights are offloaded; it is of no use afterwards."""
        self._executor.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Continues prompts.

        Args:
            prompts: one or several, each text, token ids, chat messages or a `Chat`.
            sampling: for all, or one for each; what it leaves out, and all of it by default, is as the model's folder
                wants it, see `generation_defaults`.

        Returns:
            One completion per prompt, in order, with `alternatives` where several were asked for. What a request is
            batched with does not change its tokens, unless two tokens are equal to within the rounding of the model's
            dtype.

        Raises:
            PromptError: a prompt is empty, not understood, or has ids outside the vocabulary.
            CapacityError: prompt plus `max_new_tokens` exceeds `max_tokens`, or the prompt the folder's `max_length`.
            ConfigError: the model cannot generate, or the sampling parameters do not fit.
        """
        run = self._run(self._intake.requests(prompts, sampling))
        self.stats = run.stats
        return run.completions()

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Stream:
        """Like `generate`, token by token. Arguments are checked at the call, not at the first event."""
        requests = self._intake.requests(prompts, sampling)
        if any(r.params.num_beams > 1 for r in requests):
            raise ConfigError(
                "stream cannot run a beam search, which knows its text only at the end; use generate, or num_beams=1"
            )
        run = self._run(requests)
        self.stats = run.stats
        return run.stream()

    def classify(
        self, texts: Text | Sequence[Text], token_types: Sequence[Any] | Int[np.ndarray, "B S"] | None = None
    ) -> list[Classification]:
        """Labels of texts by a sequence classifier, and their scores.

        The scores are the softmax of the logits; with the config's `problem_type` "multi_label_classification", where
        labels do not exclude each other, the sigmoid; of "regression", or with a single label, the logits themselves.

        Args:
            texts: one or several, each text, a pair of texts as a tuple, token ids, chat messages or a `Chat`, without
                the opening of an answer. A tuple of two texts is a pair, a list of two texts are two.
            token_types: segment ids of texts that are given as token ids, a row for each; by default 0. The tokenizer
                tells those of text.

        Returns:
            What is said of each text, in order. It does not depend on what the text is batched with.

        Raises:
            ConfigError: the model is no sequence classifier, or the token types do not fit.
            PromptError: a text is empty, not understood, or has ids outside the vocabulary, or for RoBERTa the padding
                id.
            CapacityError: a text has more than `max_tokens` tokens.
        """
        classifier = self.spec.classifier
        if classifier is None or classifier.labels is None:
            call = self.spec.main_call
            raise ConfigError(f"this {self.spec.family} model is not a sequence classifier; use {call}")
        return [Classification.of(classifier, logits) for logits in self._outputs_of(texts, token_types)]

    def pool(
        self, texts: Text | Sequence[Text], token_types: Sequence[Any] | Int[np.ndarray, "B S"] | None = None
    ) -> Float[np.ndarray, "B E"]:
        """A float32 vector for each text, by the pooler of a bare encoder: `pooler_output` of `transformers`.

        Args:
            texts, token_types: as for `classify`, which also has the errors.
        """
        classifier = self.spec.classifier
        if classifier is None or classifier.labels is not None:
            raise ConfigError(f"this {self.spec.family} model has no pooler alone; use {self.spec.main_call}")
        return np.stack(self._outputs_of(texts, token_types))

    def _outputs_of(self, texts: Any, token_types: Any) -> list[np.ndarray]:
        rows = TextIntake(self.spec, self.tokenizer, self.max_tokens).rows(texts, token_types)
        self.stats = GenerationStats(prompt_tokens=sum(len(row.tokens) for row in rows))
        start = time.perf_counter()
        with Measured(self._executor, self.stats):
            outputs = dict(classify(self._executor, rows, max_rows=self.config.max_batch_size))
        self.stats.first_token_seconds = time.perf_counter() - start
        check_finite(rows, outputs)
        return [outputs[row.index] for row in rows]

    def forward(
        self,
        tokens: Int[Array, "B S"] | Sequence[Sequence[int]],
        lengths: Int[Array, " B"] | Sequence[int] | None = None,
        token_types: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S V"]:
        """Float32 logits of every token of a right-padded batch.

        Models without a language-model head give hidden states `[B, S, E]`, sequence classifiers too: what those say of
        whole sequences is `classify`'s to give.

        Args:
            tokens: ids; rows of unequal length are padded here.
            lengths: real tokens of each row; by default each row's own length.
            token_types: segment ids, for models that have them (BERT).
        """
        rows = encode_rows(tokens, self.spec.vocab_size)
        own = [len(row) for row in rows]
        width = max(own)
        if width > self.max_tokens:
            raise CapacityError(f"a row has {width} tokens, more than the {self.max_tokens} this engine takes")
        bucket = token_bucket(width)
        if self.spec.position_table is not None:
            bucket = min(bucket, self.spec.position_table)
        counts = _integers("lengths", own if lengths is None else lengths, (len(rows),))
        if (counts < 1).any() or (counts > own).any():
            raise ConfigError(f"lengths={counts.tolist()} must give each of the rows of {own} tokens 1 to all of them")
        types = None
        if token_types is not None:
            kinds = self.spec.embedding.token_types
            types = _integers("token_types", token_types, (len(rows), width))
            if not kinds or (types < 0).any() or (types >= kinds).any():
                have = f"types 0 to {kinds - 1}" if kinds else "no token types"
                raise ConfigError(f"token_types has ids from {types.min()} to {types.max()}; this model has {have}")
            types = np.pad(types, ((0, 0), (0, bucket - width)))
        return forward(self._executor, pad_rows(rows, bucket), counts, types)[:, :width]

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
            sampling: which sampler features and how many new tokens; by default those of `generate`.
            progress: show a bar.

        Returns:
            How many different shapes were run.
        """
        from rich.progress import track

        if self.spec.main_call in ("classify()", "pool()"):
            return self._warmup_classifier(batch_sizes, prompt_lengths, progress=progress)
        asked = sampling or SamplingParams()
        params = self._intake.filled(asked, [0] * min(prompt_lengths, default=1))
        asked = dataclasses.replace(asked, max_new_tokens=params.max_new_tokens)
        longest = max(1, self.max_tokens - params.max_new_tokens)
        most = most_requests(self.config.max_batch_size, self._intake.requests([[0]], asked)[0])
        shapes = sorted({(min(b, most), min(n, longest)) for b in batch_sizes for n in prompt_lengths})
        by_bucket = {(b, token_bucket(n)): (b, n) for b, n in shapes}
        for batch, length in track(by_bucket.values(), description="compiling", disable=not progress):
            self._run(self._intake.requests([[0] * length] * batch, asked)).warm_up()
        return len(by_bucket)

    def _warmup_classifier(self, batch_sizes: Sequence[int], lengths: Sequence[int], *, progress: bool) -> int:
        from rich.progress import track

        most = self.config.max_batch_size
        shapes = sorted({(min(b, most), min(token_bucket(n), self.max_tokens)) for b in batch_sizes for n in lengths})
        for batch, length in track(shapes, description="compiling", disable=not progress):
            rows = [TokenRow(i, [0] * length) for i in range(batch)]
            dict(classify(self._executor, rows, max_rows=most))
        return len(shapes)

    @property
    def _intake(self) -> Intake:
        most = self.config.max_batch_size
        return Intake(self.spec, self.tokenizer, self.max_tokens, most, self.generation_defaults)

    def _run(self, requests: list[Request]) -> Run:
        return Run(self._executor, requests, self.config.max_batch_size, self.tokenizer, self.eos_token_ids)


def _integers(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ConfigError(f"{name} must have shape {shape}: {error}") from error
    if array.shape != shape or not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(
            f"{name} has shape {array.shape} and type {array.dtype}; it must be integers of shape {shape}"
        )
    return array.astype(np.int32)
