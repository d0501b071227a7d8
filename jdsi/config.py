"""Engine configuration, and the DeepSpeed spelling of it."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Self

from jdsi.converters import parse_dtype
from jdsi.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """How an engine runs a model. No setting changes the tokens, but for `dtype`, which changes their precision.

    Attributes:
        dtype: of weights and activations: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`: float32 on CPU, where
            narrow types are slow, bfloat16 elsewhere. DeepSpeed's and torch's names are understood.
        max_tokens: prompt plus generated tokens a sequence may have; by default what the model was trained for.
        max_batch_size: sequences decoded together; more prompts are split over several batches.
        tokenizer: folder or hub id of the tokenizer; by default the model's own.
        compilation_cache: keep compiled programs on disk: `True` (see `jdsi.runtime.enable_compilation_cache` for
            where), a folder, or `False`.
    """

    dtype: str = "auto"
    max_tokens: int | None = None
    max_batch_size: int = 64
    tokenizer: str | os.PathLike[str] | None = None
    compilation_cache: bool | str | os.PathLike[str] = True

    def __post_init__(self) -> None:
        if self.dtype != "auto":
            object.__setattr__(self, "dtype", parse_dtype(self.dtype).name)
        for field in ("max_tokens", "max_batch_size"):
            value = getattr(self, field)
            if field == "max_tokens" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field}={value!r} must be an integer of at least 1")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """A config from keys of this class or of DeepSpeed's `init_inference`.

        DeepSpeed keys that only say how DeepSpeed goes about it (kernel injection, CUDA graphs) are accepted and have
        nothing to change here. Keys that ask for something this engine does not do raise.

        Raises:
            ConfigError: an unknown key (the message names the nearest valid one), two spellings of one setting with
                different values, or a DeepSpeed setting that cannot be honoured.
        """
        own = {field.name for field in dataclasses.fields(cls)}
        settings: dict[str, Any] = {}
        for key, value in options.items():
            if key in _DEEPSPEED_HOW:
                continue
            if key in _DEEPSPEED_ONLY:
                _DEEPSPEED_ONLY[key](key, value)
                continue
            name = _DEEPSPEED_NAMES.get(key, key)
            if name not in own:
                hint = nearest(key, [*own, *_DEEPSPEED_NAMES, *_DEEPSPEED_ONLY])
                raise ConfigError(f"unknown config key {key!r}{hint}; valid are {', '.join(sorted(own))}")
            if name in settings and settings[name] != value:
                raise ConfigError(f"config key {key!r}={value!r} contradicts {name}={settings[name]!r}")
            settings[name] = value
        return cls(**settings)


def _one_device(key: str, value: Any) -> None:
    degrees = value if isinstance(value, Mapping) else {key: value}
    for name in ("tp_size", "ep_size", "mp_size", "world_size", "replica_num"):
        if degrees.get(name, 1) not in (1, None):
            raise ConfigError(f"config key {key!r} asks for {name}={degrees[name]}; this engine runs on one device")
    if key == "moe" and (value.get("enabled") if isinstance(value, Mapping) else value):
        raise ConfigError("config key 'moe' is enabled, and no supported family has experts")


def _off(key: str, value: Any) -> None:
    enabled = value.get("enabled", bool(value)) if isinstance(value, Mapping) else value
    if enabled:
        raise ConfigError(
            f"config key {key!r}={value!r} cannot be honoured: this engine does not offer it; leave it out"
        )


def _no_offload(key: str, value: Any) -> None:
    wanted = isinstance(value, Mapping) and (value.get("offload_param") or value.get("stage", 0))
    if wanted:
        raise ConfigError(f"config key {key!r}={value!r} asks for weights outside the device, which is not offered")


_DEEPSPEED_NAMES: Mapping[str, str] = MappingProxyType({"max_out_tokens": "max_tokens", "max_seq_length": "max_tokens"})
_DEEPSPEED_HOW = frozenset(
    (
        "enable_cuda_graph",
        "keep_module_on_host",
        "kernel_inject",
        "replace_method",
        "replace_with_kernel_inject",
        "return_tuple",
        "set_empty_params",
        "transposed_mode",
        "triton_autotune",
        "use_triton",
    )
)
_DEEPSPEED_ONLY: Mapping[str, Callable[[str, Any], None]] = MappingProxyType(
    {
        **dict.fromkeys(("tensor_parallel", "tp", "mp_size", "ep_size", "moe"), _one_device),
        **dict.fromkeys(
            ("quant", "injection_policy", "injection_policy_tuple", "save_mp_checkpoint_path", "ds_config"), _off
        ),
        "zero": _no_offload,
    }
)
