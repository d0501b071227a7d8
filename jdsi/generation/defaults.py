"""How a model's folder wants it sampled: `generation_config.json`."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from jdsi.converters.config import read_json
from jdsi.errors import CapacityError, CheckpointError, ConfigError, JdsiWarning

from .sampling_checks import check_values
from .sampling_fields import BEAMS, FIELDS, INT32_MAX, NEUTRAL, TRUNCATION, Unfit, flag, integer
from .sampling_params import SamplingParams
from .transformers_names import IMMATERIAL, IN_FILES, UNSUPPORTED

_FILE = "generation_config.json"
_WITHOUT = 'generation_config="ignore" does without'
_OWN_KEYS = {"do_sample", "max_length", "min_length"}
_TOP_K = 50  # what transformers samples with where nothing says otherwise


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """The values of what callers leave out.

    Attributes:
        values: what the folder asks for, by the names of `SamplingParams`. A temperature is there only where the folder
            asks for sampling: whatever it names otherwise has no effect.
        eos_token_ids: ids that end a sequence; `None` where nothing is said of them, and none where that is said.
        max_length: tokens of prompt and output together, where the folder does not say `max_new_tokens`.
        min_length: the same of the least there must be.
        unsupported: options of the folder that change tokens and cannot be honoured.
        source: the file, for messages.
    """

    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    eos_token_ids: tuple[int, ...] | None = None
    max_length: int | None = None
    min_length: int | None = None
    unsupported: tuple[str, ...] = ()
    source: str = _FILE
    _told: set[str] = dataclasses.field(default_factory=set, repr=False, compare=False)

    @classmethod
    def read(cls, folder: Path, use: str = "auto") -> Self:
        """Those of a folder: of `generation_config.json`, or without that file the ones among `config.json`'s keys.

        Args:
            folder: a checkpoint's.
            use: as `InferenceConfig.generation_config`; `"ignore"` reads the end-of-sequence ids only.

        Raises:
            CheckpointError: a file is not a JSON object, or a value is not what `transformers` would understand; null
                is as good as left out.
        """
        ends = _eos_token_ids(folder)
        path, options = _options(folder)
        if use == "ignore" or path is None:
            return cls(eos_token_ids=ends)
        return cls.of(options, ends, str(path))

    @classmethod
    def of_model(cls, model: Any, use: str = "auto") -> Self:
        """Those of a `transformers` model in memory; arguments and errors as for `read`."""
        source = f"the generation_config of {type(model).__name__}"
        own = getattr(model, "generation_config", None)
        options = {} if own is None else own.to_dict()
        said = {} if own is None else {source: _ends(source, options)}
        config = f"the config of {type(model).__name__}"
        ends = _first_said({**said, config: _ends(config, model.config.to_dict())})
        return cls(eos_token_ids=ends) if use == "ignore" else cls.of(options, ends, source)

    @classmethod
    def of(cls, options: Mapping[str, Any], eos_token_ids: tuple[int, ...] | None, source: str) -> Self:
        """Those of a `GenerationConfig`'s options; `source` is what messages call it.

        Raises:
            CheckpointError: a value is not what `transformers` would understand; `None` is as good as left out.
        """
        options = {key: value for key, value in options.items() if value is not None}

        def checked(key: str, check: Any) -> Any:
            try:
                return None if key not in options else check(options[key])
            except Unfit as error:
                wrong = f"{key} is {options[key]!r}; it must be {error}"
                raise CheckpointError(f"{source}: {wrong} ({_WITHOUT})") from None

        checked("pad_token_id", integer(-INT32_MAX))  # nothing here is padded with it, but it must be a number
        unsupported = [key for key in options if _unsupported(key, options[key])]
        samples = checked("do_sample", flag)
        values = {ours: checked(key, FIELDS[ours].check) for key, ours in IN_FILES.items() if key in options}
        if samples:
            values = {"temperature": 1.0, "top_k": _TOP_K} | values
        else:
            values.pop("temperature", None)
            if values.get("n", 1) > 1 and values.get("num_beams", 1) == 1:
                unsupported.append("num_return_sequences")  # as in transformers: greedy search has one result
        return cls(
            values=values,
            eos_token_ids=eos_token_ids,
            max_length=checked("max_length", integer(1)),
            min_length=checked("min_length", integer(0)),
            unsupported=tuple(sorted(unsupported)),
            source=source,
        )

    def check(self, vocab_size: int) -> None:
        """Raises `CheckpointError` where the folder names tokens that a vocabulary does not have."""
        try:
            check_values(self.values, vocab_size)
        except ConfigError as error:
            raise CheckpointError(f"{self.source}: {error} ({_WITHOUT})") from None

    def end_of(self, tokenizer: Any) -> tuple[int, ...]:
        """Ids that end a sequence, where nothing is said of them those of a tokenizer.

        Warns:
            JdsiWarning: of the latter, for `transformers` takes them from files of the model only.
        """
        if self.eos_token_ids is not None:
            return self.eos_token_ids
        end = getattr(tokenizer, "eos_token_id", None)
        if end is None:
            return ()
        self.tell(
            f"the model names no eos_token_id: that of its tokenizer, {end}, ends a sequence, and not in transformers; "
            "eos_token_ids=() goes on"
        )
        return (end,)

    def warn(self) -> None:
        """Names what cannot be honoured, if there is anything."""
        if self.unsupported:
            self.tell(f"{self.source} asks for {', '.join(self.unsupported)}, which cannot be honoured")

    def fill(self, params: SamplingParams, prompt_tokens: int, max_tokens: int, name: str = "prompt") -> SamplingParams:
        """A request's parameters with a value for every field.

        What the caller gives decides between sampling, beam search and greedy search; of the folder's values those
        apply that this has a use for.

        Args:
            params: as the caller gave them.
            prompt_tokens: of the request.
            max_tokens: that prompt and output may have together.
            name: what error messages call the prompt.

        Raises:
            ConfigError: the values contradict each other, or both folder and caller leave open which of sampling and
                beam search is meant.
            CapacityError: the prompt is as long as the folder's `max_length`.
        """
        given, folder = params.given, dict(self.values)
        self._choose(given, folder)
        if "max_new_tokens" not in given:
            folder["max_new_tokens"] = self._new_tokens(prompt_tokens, max_tokens, name)
        if "min_new_tokens" not in given:
            least = folder.get("min_new_tokens", max(0, (self.min_length or 0) - prompt_tokens))
            folder["min_new_tokens"] = min(least, given.get("max_new_tokens", folder.get("max_new_tokens", least)))
        return params.filled(folder, self.source)

    def _choose(self, given: Mapping[str, Any], folder: dict[str, Any]) -> None:
        """Takes out of the folder's values those that are for another way of search than the caller's."""
        beams = given.get("num_beams", folder.get("num_beams", 1))
        temperature = given.get("temperature", folder.get("temperature", 0.0))
        drop: tuple[str, ...] = ()
        if beams > 1 and temperature > 0 and not ("num_beams" in given and "temperature" in given):
            if "num_beams" in given:
                drop = ("temperature", *TRUNCATION)
                self.tell(f"num_beams={beams} searches with beams: {self.source} does not sample here")
            elif "temperature" in given:
                beams, drop = 1, ("num_beams",)
                self.tell(f"temperature={temperature:g} samples: {self.source} does not search with beams here")
            else:
                raise ConfigError(
                    f"{self.source} asks for do_sample with num_beams={beams}: sampling with beams is not supported; "
                    "give num_beams=1 to sample, or temperature=0 to search with beams"
                )
        if beams == 1:
            drop = (*drop, *BEAMS)
        if "n" in folder:  # greedy search has one result, and a beam search as many as beams
            folder["n"] = min(folder["n"], beams) if beams > 1 else folder["n"] if temperature > 0 else 1
        for field in drop:
            folder.pop(field, None)

    def _new_tokens(self, prompt_tokens: int, max_tokens: int, name: str) -> int:
        wanted = self.values.get("max_new_tokens", NEUTRAL["max_new_tokens"])
        if self.max_length is not None and "max_new_tokens" not in self.values:
            wanted = self.max_length - prompt_tokens
            if wanted < 1:
                raise CapacityError(
                    f"{name} has {prompt_tokens} tokens, and max_length of {self.source} is {self.max_length}, prompt "
                    "included; give max_new_tokens"
                )
        return max(1, min(wanted, max_tokens - prompt_tokens))

    def tell(self, message: str) -> None:
        """Warns, once of the same."""
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, JdsiWarning, stacklevel=3)


def _options(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """What is set, and in which file."""
    path = folder / _FILE
    if path.exists():
        return path, read_json(path)
    path = folder / "config.json"
    if not path.exists():
        return None, {}
    known = {*IN_FILES, *_OWN_KEYS, *UNSUPPORTED}
    config = read_json(path)
    inner = next((config[key] for key in ("decoder", "generator", "text_config") if config.get(key)), {})
    found: dict[str, Any] = {}
    for options in (inner if isinstance(inner, dict) else {}, config):
        found |= {key: value for key, value in options.items() if key in known and value is not None}
    return path, found


def _unsupported(key: str, value: Any) -> bool:
    neutral = key in UNSUPPORTED and value == UNSUPPORTED[key]
    return not (neutral or key in IN_FILES or key in _OWN_KEYS or key in IMMATERIAL)


def _eos_token_ids(folder: Path) -> tuple[int, ...] | None:
    """Ids that end a sequence: of `generation_config.json` if it says any, else of `config.json`."""
    said = {}
    for name, path in ((str(folder / _FILE), folder / _FILE), ("config.json", folder / "config.json")):
        if path.exists():
            said[name] = _ends(str(path), read_json(path))
    return _first_said(said)


def _first_said(places: Mapping[str, tuple[int, ...] | None]) -> tuple[int, ...] | None:
    """What the first of the places says that says anything.

    Warns:
        JdsiWarning: that is not the first of all, which for `transformers` settles it.
    """
    said = [place for place, ends in places.items() if ends is not None]
    if not said:
        return None
    if (first := next(iter(places))) != said[0] and places[said[0]]:
        message = f"{first} names no eos_token_id: that of {said[0]} ends a sequence, and not in transformers"
        warnings.warn(message, JdsiWarning, stacklevel=2)
    return places[said[0]]


def _ends(place: str, options: Mapping[str, Any]) -> tuple[int, ...] | None:
    value = options.get("eos_token_id")
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise CheckpointError(f"{place}: eos_token_id is {value!r}; it must be null, a token id or a list of them")
    return tuple(ids)
