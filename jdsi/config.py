"""Engine configuration, in our keys or DeepSpeed's."""

import dataclasses
import json
import numbers
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from jdsi import deepspeed
from jdsi.converters import parse_dtype, parse_size
from jdsi.errors import ConfigError, nearest
from jdsi.kv_cache import CacheSpec

OFFLOADS = ("host", "nvme", "auto")
KV_OFFLOADS = ("host", "nvme")
GENERATION_CONFIGS = ("auto", "ignore")
PARALLELISMS = ("auto", "latency", "throughput")
_PIPELINE = {"micro_batches": None, "prompt_pieces": 1}  # neutral values
_DEGREES = ("tensor_parallel", "pipeline_parallel", "data_parallel")


def number(value: Any) -> Any:
    """An integer that came as text, as from an environment variable; anything else as it is."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,18}\s*", value) else value


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """How an engine runs a model. No setting but `dtype` changes the tokens, short of ties within its rounding.

    Attributes:
        dtype: of weights and activations: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`: float32 on CPU, where
            narrow types are slow, bfloat16 elsewhere. DeepSpeed's and torch's names are understood.
        max_tokens: prompt plus generated tokens a sequence may have; by default what the model was trained for. Models
            with a learned position table take no more than that, others (rotary, ALiBi) may be given more.
        max_batch_size: rows decoded together, at most, in all micro-batches of a pipeline; more prompts are split over
            several batches.
        checkpoint: folder or hub id of the model, where `init_inference` is given none; else of the weights alone, for
            the model that it is given. Then also what DeepSpeed takes, see `jdsi.converters.weight_list.weights_of`.
        strict: whether tensors of a checkpoint that the model does not use are an error, and not a warning.
        tokenizer: folder or hub id of the tokenizer; by default the model's own.
        generation_config: `"auto"` takes sampling parameters that callers leave out from the `generation_config.json`
            in the model's folder, `"ignore"` nothing but the ids that end a sequence.
        compilation_cache: keep compiled programs on disk: `True` (see `jdsi.runtime.enable_compilation_cache` for
            where), a folder, or `False`, which leaves JAX as it is.
        kernels: run hand-written GPU kernels where the device has them; without, XLA's own. Also spelt
            `replace_with_kernel_inject`.
        offload: where weights live that do not stay on the device: `"host"` memory, `"nvme"` (the checkpoint's own
            files), or `"auto"`, which takes the fastest that the memory allows; `None` keeps the whole model there.
        memory_limit: bytes, or text such as `"2GiB"`, of the device's memory that an offloaded model may take with its
            KV cache; on a CPU that is the memory of the process, of which 400 MiB are set aside for all else (importing
            transformers and torch may take more). By default what is free. With `parallelism`, of each device.
        gpu_direct: read the files of `offload="nvme"` straight into the memory of GPUs, by GPUDirect Storage; needs
            kvikio (`pip install kvikio-cu13`, or `kvikio-cu12` for CUDA 12). Also DeepSpeed's `aio.use_gds`.
        batches_per_pass: how many batches of `max_batch_size` rows share one reading of offloaded weights where there
            are prompts for more than one; memory for their keys and values is set aside before layers are kept. By
            default as many as fit beside the layers that do.
        kv_offload: where keys and values of an offloaded model live between the turns of their layers: `"host"` memory,
            or `"nvme"`, a file that is gone when the process ends; `None` keeps them on the device.
        spill_folder: where that file lies; by default the temporary folder.
        devices_per_link: devices that share a link to the host: each of n offloads keys and values of every n-th layer
            only, no two of the same one, so that they do not compete for the link.
        cache: the kind of KV memory, a `jdsi.kv_cache.CacheSpec`; by default a row of fixed room for each sequence.
        tensor_parallel: devices that share every layer. Also DeepSpeed's `tensor_parallel.tp_size`, `tp`, `mp_size`.
        pipeline_parallel: stages of consecutive layers, each on devices of its own.
        data_parallel: groups of devices that share the rows of a batch.
        parallelism: `"latency"` or `"throughput"` chooses the three degrees for the devices there are; `"auto"` is
            `"latency"`. `None` takes them as given.
        sequence_parallel: whether the ranks of a tensor-parallel group divide the tokens among them between products;
            `None` decides by their number.
        micro_batches: batches on their way through a pipeline at a time; by default one for each stage.
        prompt_pieces: into how many equal pieces, at most, a batch is cut while its prompts are read, so that a
            pipeline fills sooner.
    """

    dtype: str = "auto"
    max_tokens: int | None = None
    max_batch_size: int = 64
    checkpoint: str | os.PathLike[str] | Mapping[str, Any] | None = None
    strict: bool = False
    tokenizer: str | os.PathLike[str] | None = None
    generation_config: str = "auto"
    compilation_cache: bool | str | os.PathLike[str] = True
    kernels: bool = True
    offload: str | None = None
    memory_limit: int | str | None = None
    gpu_direct: bool = False
    batches_per_pass: int | None = None
    kv_offload: str | None = None
    spill_folder: str | os.PathLike[str] | None = None
    devices_per_link: int = 1
    cache: CacheSpec | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    parallelism: str | None = None
    sequence_parallel: bool | None = None
    micro_batches: int | None = None
    prompt_pieces: int = 1

    def __post_init__(self) -> None:
        if self.dtype != "auto":
            object.__setattr__(self, "dtype", parse_dtype(self.dtype).name)
        counts = {"max_tokens", "max_batch_size", "batches_per_pass", "devices_per_link", *_DEGREES, *_PIPELINE}
        for field in sorted(counts):
            value = number(getattr(self, field))
            if field in ("max_tokens", "batches_per_pass", "micro_batches") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise ConfigError(f"{field}={value!r} must be an integer of at least 1")
            object.__setattr__(self, field, int(value))
        if self.offload not in (None, *OFFLOADS):
            raise ConfigError(
                f"offload={self.offload!r}{nearest(str(self.offload), OFFLOADS)} must be one of {OFFLOADS}"
            )
        if not isinstance(self.checkpoint, str | os.PathLike | Mapping | None):
            raise ConfigError(f"checkpoint={self.checkpoint!r} must be a folder, a hub id or a description of files")
        if self.generation_config not in GENERATION_CONFIGS:
            hint = nearest(str(self.generation_config), GENERATION_CONFIGS)
            raise ConfigError(f"generation_config={self.generation_config!r}{hint} must be one of {GENERATION_CONFIGS}")
        if self.memory_limit is not None:
            object.__setattr__(self, "memory_limit", parse_size(self.memory_limit))
            if self.offload is None and self.parallelism is None:
                raise ConfigError("memory_limit is for offload='host', 'nvme' or 'auto', and for parallelism")
        for field in ("kernels", "gpu_direct", "strict"):
            if not isinstance(getattr(self, field), bool):
                raise ConfigError(f"{field}={getattr(self, field)!r} must be true or false")
        if self.gpu_direct and self.offload != "nvme":
            raise ConfigError("gpu_direct is for offload='nvme'")
        if self.batches_per_pass is not None and self.offload is None:
            raise ConfigError("batches_per_pass is for offload='host', 'nvme' or 'auto'")
        if self.cache is not None and not callable(getattr(self.cache, "create", None)):
            raise ConfigError(f"cache={self.cache!r} must be a jdsi.kv_cache.CacheSpec, which only Python can give")
        self._check_kv_offload()
        self._check_parallelism()

    def _check_kv_offload(self) -> None:
        if self.kv_offload not in (None, *KV_OFFLOADS):
            hint = nearest(str(self.kv_offload), KV_OFFLOADS)
            raise ConfigError(f"kv_offload={self.kv_offload!r}{hint} must be one of {KV_OFFLOADS}")
        if self.kv_offload is not None and self.offload is None:
            raise ConfigError("kv_offload is for models that run layer by layer; set offload='host', 'nvme' or 'auto'")
        if self.kv_offload is not None and self.cache is not None:
            raise ConfigError("cache and kv_offload both say where keys and values live; leave one of them out")
        if self.spill_folder is not None and self.kv_offload != "nvme":
            raise ConfigError("spill_folder is for kv_offload='nvme'")
        if self.devices_per_link > 1 and self.kv_offload is None:
            raise ConfigError("devices_per_link is for kv_offload")

    def _check_parallelism(self) -> None:
        degrees = {name: getattr(self, name) for name in _DEGREES if getattr(self, name) > 1}
        if self.parallelism not in (None, *PARALLELISMS):
            hint = nearest(str(self.parallelism), PARALLELISMS)
            raise ConfigError(f"parallelism={self.parallelism!r}{hint} must be one of {PARALLELISMS}")
        if self.parallelism is not None and degrees:
            raise ConfigError(f"parallelism={self.parallelism!r} chooses the degrees; leave out {', '.join(degrees)}")
        if self.offload is not None and (self.pipeline_parallel > 1 or self.parallelism):
            asked = f"parallelism={self.parallelism!r}" if self.parallelism else "pipeline_parallel of 2 or more"
            raise ConfigError(
                f"offload={self.offload!r} runs all layers on every device; it cannot be combined with {asked},"
                " but with tensor_parallel and data_parallel"
            )
        if self.offload is not None and self.sequence_parallel:
            raise ConfigError("sequence_parallel is not for offload, which gathers weights, not tokens")
        if self.sequence_parallel is not None and not isinstance(self.sequence_parallel, bool):
            raise ConfigError(f"sequence_parallel={self.sequence_parallel!r} must be true, false or left out")
        if self.sequence_parallel and self.tensor_parallel == 1 and self.parallelism is None:
            raise ConfigError("sequence_parallel is for tensor_parallel of 2 or more")
        if self.pipeline_parallel == 1:
            for name, neutral in _PIPELINE.items():
                if getattr(self, name) != neutral:
                    raise ConfigError(f"{name} is for pipeline_parallel of 2 or more")

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
        for key, name, value in deepspeed.in_our_keys(options):
            if name not in own:
                hint = nearest(str(key), [*own, *deepspeed.known_keys()])
                raise ConfigError(
                    f"unknown config key {key!r}{hint}; valid are {', '.join(sorted(own))}, and DeepSpeed's"
                )
            if name in settings and number(settings[name]) != number(value):
                raise ConfigError(f"config key {key!r}={value!r} contradicts {name}={settings[name]!r}")
            settings[name] = value
        return settings
