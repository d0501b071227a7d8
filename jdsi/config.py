"""Engine configuration, and the DeepSpeed spelling of it."""

import dataclasses
import json
import numbers
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from jdsi.converters import parse_dtype, parse_size
from jdsi.errors import ConfigError, nearest

OFFLOADS = ("host", "nvme", "auto")


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """How an engine runs a model. No setting but `dtype` changes the tokens, short of ties within its rounding.

    Attributes:
        dtype: of weights and activations: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`: float32 on CPU, where
            narrow types are slow, bfloat16 elsewhere. DeepSpeed's and torch's names are understood.
        max_tokens: prompt plus generated tokens a sequence may have; by default what the model was trained for. Models
            with a learned position table take no more than that, others (rotary, ALiBi) may be given more.
        max_batch_size: rows decoded together, at most; more prompts are split over several batches.
        checkpoint: folder or hub id of the model, where `init_inference` is given none.
        tokenizer: folder or hub id of the tokenizer; by default the model's own.
        compilation_cache: keep compiled programs on disk: `True` (see `jdsi.runtime.enable_compilation_cache` for
            where), a folder, or `False`, which leaves JAX as it is.
        kernels: run hand-written GPU kernels where the device has them; without, XLA's own. Also spelt
            `replace_with_kernel_inject`.
        offload: where weights live that do not stay on the device: `"host"` memory, `"nvme"` (the checkpoint's own
            files), or `"auto"`, which takes the fastest that the memory allows; `None` keeps the whole model there.
        memory_limit: bytes, or text such as `"2GiB"`, of the device's memory that an offloaded model may take with its
            KV cache; on a CPU that is the memory of the process, of which 400 MiB are set aside for all else (importing
            transformers and torch may take more). By default what is free.
    """

    dtype: str = "auto"
    max_tokens: int | None = None
    max_batch_size: int = 64
    checkpoint: str | os.PathLike[str] | None = None
    tokenizer: str | os.PathLike[str] | None = None
    compilation_cache: bool | str | os.PathLike[str] = True
    kernels: bool = True
    offload: str | None = None
    memory_limit: int | str | None = None

    def __post_init__(self) -> None:
        if self.dtype != "auto":
            object.__setattr__(self, "dtype", parse_dtype(self.dtype).name)
        for field in ("max_tokens", "max_batch_size"):
            value = getattr(self, field)
            if field == "max_tokens" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise ConfigError(f"{field}={value!r} must be an integer of at least 1")
            object.__setattr__(self, field, int(value))
        if self.offload not in (None, *OFFLOADS):
            raise ConfigError(
                f"offload={self.offload!r}{nearest(str(self.offload), OFFLOADS)} must be one of {OFFLOADS}"
            )
        if self.memory_limit is not None:
            object.__setattr__(self, "memory_limit", parse_size(self.memory_limit))
            if self.offload is None:
                raise ConfigError("memory_limit is for offload='host', 'nvme' or 'auto'")
        if not isinstance(self.kernels, bool):
            raise ConfigError(f"kernels={self.kernels!r} must be true or false")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any], **overrides: Any) -> Self:
        """A config from keys of this class or of DeepSpeed's `init_inference`; `overrides` win over `options`.

        DeepSpeed keys that only say how DeepSpeed goes about it (CUDA graphs) are accepted and have
        nothing to change here. Keys that ask for something this engine does not do raise.

        Raises:
            ConfigError: an unknown key (the message names the nearest valid one), two spellings of one setting with
                different values, or a DeepSpeed setting that cannot be honoured.
        """
        return cls(**{**cls._settings(options), **cls._settings(overrides)})

    @classmethod
    def read(cls, path: str | os.PathLike[str], **overrides: Any) -> Self:
        """`from_dict` of a JSON file."""
        try:
            options = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"the config {path} cannot be read: {error}") from error
        if not isinstance(options, dict):
            raise ConfigError(f"the config {path} holds a JSON {type(options).__name__}, not an object")
        return cls.from_dict(options, **overrides)

    @classmethod
    def _settings(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        own = {field.name for field in dataclasses.fields(cls)}
        settings: dict[str, Any] = {}
        for key, value in options.items():
            if key in _DEEPSPEED_HOW:
                continue
            if key == "zero":
                key, value = "offload", _zero(value)
                if value is None:
                    continue
            if key in _DEEPSPEED_ONLY:
                _DEEPSPEED_ONLY[key](key, value)
                continue
            name = _DEEPSPEED_NAMES.get(key, key)
            if name not in own:
                hint = nearest(str(key), [*own, *_DEEPSPEED_NAMES, *_DEEPSPEED_ONLY])
                raise ConfigError(
                    f"unknown config key {key!r}{hint}; valid are {', '.join(sorted(own))}, and DeepSpeed's"
                )
            if name in settings and settings[name] != value:
                raise ConfigError(f"config key {key!r}={value!r} contradicts {name}={settings[name]!r}")
            settings[name] = value
        return settings


def _one_device(key: str, value: Any) -> None:
    degrees = value if isinstance(value, Mapping) else {key: value}
    for name in (key, "tp_size", "ep_size", "mp_size", "world_size", "replica_num"):
        if degrees.get(name, 1) not in (1, None):
            raise ConfigError(
                f"config key {key!r} asks for {name}={degrees[name]}; it knows one device; for a mesh see load_model"
            )


def _no_experts(key: str, value: Any) -> None:
    if isinstance(value, Mapping):
        _one_device(key, value)
    enabled = value.get("enabled") if isinstance(value, Mapping) else value not in (None, False, 1, [1])
    if enabled:
        raise ConfigError(f"config key {key!r}={value!r} asks for experts, and no supported family has them")


def _off(key: str, value: Any) -> None:
    enabled = value.get("enabled", bool(value)) if isinstance(value, Mapping) else value
    if enabled:
        raise ConfigError(
            f"config key {key!r}={value!r} cannot be honoured: this engine does not offer it; leave it out"
        )


def _zero(value: Any) -> str | None:
    """What DeepSpeed's `zero` says of `offload`: its stage 3 with `offload_param` is what that does here."""
    settings = value or {}
    if not isinstance(settings, Mapping):
        raise ConfigError(f"config key 'zero'={value!r} must be an object with offload_param")
    where = settings.get("offload_param") or {}
    device = where.get("device", "none") if isinstance(where, Mapping) else where
    if device in ("none", None):
        return None
    if not isinstance(device, str) or device not in _ZERO_DEVICES:
        raise ConfigError(f"config key 'zero' asks for offload_param.device={device!r}; known: none, cpu, nvme")
    return _ZERO_DEVICES[device]


def _only(right: Any) -> Callable[[str, Any], None]:
    def check(key: str, value: Any) -> None:
        if value is not None and value != right:
            raise ConfigError(f"config key {key!r}={value!r} cannot be honoured; leave it out, or {right!r}")

    return check


_ZERO_DEVICES: Mapping[str, str] = MappingProxyType({"cpu": "host", "nvme": "nvme"})
_DEEPSPEED_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "kernel_inject": "kernels",
        "max_out_tokens": "max_tokens",
        "max_seq_length": "max_tokens",
        "replace_with_kernel_inject": "kernels",
    }
)
_DEEPSPEED_HOW = frozenset(
    (
        "enable_cuda_graph",
        "keep_module_on_host",
        "replace_method",
        "return_tuple",
        "set_empty_params",
        "transposed_mode",
        "triton_autotune",
        "use_triton",
    )
)
_DEEPSPEED_ONLY: Mapping[str, Callable[[str, Any], None]] = MappingProxyType(
    {
        **dict.fromkeys(("tensor_parallel", "tp", "mp_size", "ep_size", "training_mp_size"), _one_device),
        **dict.fromkeys(("moe", "moe_experts"), _no_experts),
        **dict.fromkeys(
            (
                "base_dir",
                "ds_config",
                "injection_dict",
                "injection_policy",
                "injection_policy_tuple",
                "quant",
                "save_mp_checkpoint_path",
            ),
            _off,
        ),
        "min_out_tokens": _only(1),
        "moe_type": _only("standard"),
        "triangular_masking": _only(True),
    }
)
