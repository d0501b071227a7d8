"""The keys of DeepSpeed's `init_inference`, in terms of ours."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from jdsi.errors import ConfigError, nearest

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "kernel_inject": "kernels",
        "max_out_tokens": "max_tokens",
        "max_seq_length": "max_tokens",
        "mp_size": "tensor_parallel",
        "replace_with_kernel_inject": "kernels",
        "tp": "tensor_parallel",
    }
)
"""Keys with a setting of ours that means the same."""


def in_our_keys(options: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Each option as its key, the setting of ours it stands for, and that setting's value.

    Keys that only say how DeepSpeed goes about it (CUDA graphs) have nothing to change here and are left out.

    Raises:
        ConfigError: a key asks for something that this engine does not do.
    """
    for key, value in options.items():
        if key in _HOW:
            continue
        if key in _ONLY:
            _ONLY[key](key, value)
            continue
        name = NAMES.get(key, key)
        if key == "zero":
            name, value = "offload", _zero(value)
            if value is None:
                continue
        if key == "aio":
            name, value = "gpu_direct", _aio(value)
            if value is None:
                continue
        if name == "tensor_parallel" and isinstance(value, Mapping):
            value = _tensor_parallel(key, value)
            if value is None:
                continue
        yield key, name, value


def known_keys() -> list[str]:
    """All keys of DeepSpeed that are understood, if only to refuse them."""
    return [*NAMES, *_HOW, *_ONLY, "aio", "zero"]


def _tensor_parallel(key: str, value: Mapping[str, Any]) -> Any:
    if unknown := sorted(map(str, value.keys() - {"enabled", "tp_size", "tp_grain_size", "mpu", "tp_group"})):
        raise ConfigError(f"config key {key!r} has {', '.join(unknown)}; what counts here is tp_size")
    for name in ("mpu", "tp_group"):
        if value.get(name) is not None:
            raise ConfigError(f"config key {key!r} has {name}, a process group of torch's; leave it out")
    if not isinstance(value.get("enabled", True), bool):
        raise ConfigError(f"config key {key!r} has enabled={value['enabled']!r}, which must be true or false")
    return value.get("tp_size") if value.get("enabled", True) else 1


def _is_one(value: Any) -> bool:
    """Whether something is the number 1, also as text; True, which Python calls equal to it, is not."""
    return not isinstance(value, bool) and value in (1, "1")


def _one(key: str, value: Any) -> None:
    degrees = value if isinstance(value, Mapping) else {key: value}
    for name in (key, "ep_size", "replica_num", "moe_experts"):
        degree = degrees.get(name)
        several = isinstance(degree, list | tuple)
        if not (all(map(_is_one, degree)) if several else degree is None or _is_one(degree)):
            raise ConfigError(f"config key {key!r} asks for {name}={degree}; no supported family has experts")


def _trained_whole(key: str, value: Any) -> None:
    if not (value is None or _is_one(value)):
        raise ConfigError(
            f"config key {key!r}={value!r}: give a checkpoint in Hugging Face format; it is split while it is read"
        )


def _no_experts(key: str, value: Any) -> None:
    """`moe` says whether there are any, `moe_experts` how many."""
    if isinstance(value, Mapping):
        _one(key, value)
        enabled = value.get("enabled")
    elif isinstance(value, bool):
        enabled = value
    elif key == "moe" and value in (0, 1, "0", "1"):
        enabled = value in (1, "1")
    else:
        return _one(key, value)
    if enabled:
        raise ConfigError(f"config key {key!r}={value!r} asks for experts, and no supported family has them")


def _off(key: str, value: Any) -> None:
    enabled = value.get("enabled", bool(value)) if isinstance(value, Mapping) else value
    if enabled:
        raise ConfigError(
            f"config key {key!r}={value!r} cannot be honoured: this engine does not offer it; leave it out"
        )


def _in_the_description(key: str, value: Any) -> None:
    if value:
        raise ConfigError(
            f"config key {key!r}={value!r}: say 'base_dir' in what checkpoint= describes, beside its files"
        )


def _of_training(hint: str) -> Callable[[str, Any], None]:
    def refuse(key: str, value: Any) -> None:
        raise ConfigError(f"config key {key!r} is of DeepSpeed's training configuration; {hint}")

    return refuse


def _precision(dtype: str) -> Callable[[str, Any], None]:
    def check(key: str, value: Any) -> None:
        asks = value.get("enabled", True) if isinstance(value, Mapping) else value
        if asks not in (None, False):
            _of_training(f"here it is dtype={dtype!r}")(key, value)

    return check


def _zero(value: Any) -> str | None:
    """What DeepSpeed's `zero` says of `offload`: its stage 3 with `offload_param` is what that does here."""
    settings = value or {}
    if not isinstance(settings, Mapping):
        raise ConfigError(f"config key 'zero'={value!r} must be an object with offload_param")
    for name in settings:
        if name not in _ZERO and not str(name).startswith(("stage3_", "zero_")):
            raise ConfigError(
                f"config key 'zero' has {name!r}{nearest(str(name), _ZERO)}; what counts here is offload_param"
            )
    where = settings.get("offload_param") or {}
    if isinstance(where, Mapping) and (unknown := sorted(map(str, where.keys() - _OFFLOAD_PARAM))):
        raise ConfigError(f"config key 'zero' has offload_param with {', '.join(unknown)}; what counts here is device")
    device = where.get("device", "none") if isinstance(where, Mapping) else where
    if device in ("none", None):
        return None
    if not isinstance(device, str) or device not in _ZERO_DEVICES:
        raise ConfigError(f"config key 'zero' asks for offload_param.device={device!r}; known: none, cpu, nvme")
    return _ZERO_DEVICES[device]


def _aio(value: Any) -> bool | None:
    """What DeepSpeed's `aio` says of `gpu_direct`."""
    settings = value or {}
    if not isinstance(settings, Mapping):
        raise ConfigError(f"config key 'aio'={value!r} must be an object with use_gds")
    for name in settings:
        if name not in _AIO:
            raise ConfigError(f"config key 'aio' has {name!r}{nearest(str(name), _AIO)}; what counts here is use_gds")
    direct = settings.get("use_gds")
    if direct is not None and not isinstance(direct, bool):
        raise ConfigError(f"config key 'aio' has use_gds={direct!r}, which must be true or false")
    return direct


def _only(right: Any) -> Callable[[str, Any], None]:
    def check(key: str, value: Any) -> None:
        if not (value is None or value == right or (_is_one(right) and _is_one(value))) or (
            isinstance(value, bool) and not isinstance(right, bool)
        ):
            raise ConfigError(f"config key {key!r}={value!r} cannot be honoured; leave it out, or {right!r}")

    return check


# What DeepSpeed's ZeRO configuration has; all but offload_param is about training, or how it goes about it.
_ZERO = frozenset(
    (
        *(
            "stage",
            "offload_param",
            "offload_optimizer",
            "cpu_offload",
            "cpu_offload_param",
            "cpu_offload_use_pin_memory",
        ),
        *("contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"),
        *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "load_from_fp32_weights"),
        *("elastic_checkpoint", "sub_group_size", "prefetch_bucket_size", "param_persistence_threshold"),
        *("model_persistence_threshold", "max_live_parameters", "max_reuse_distance", "memory_efficient_linear"),
        *("gather_16bit_weights_on_model_save", "ignore_unused_parameters", "legacy_stage1", "round_robin_gradients"),
        *("module_granularity_threshold", "mics_shard_size", "mics_hierarchical_params_gather"),
        *("pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings"),
    )
)
# What its asynchronous reader has; all but use_gds is about how that goes about it.
_AIO = frozenset(
    ("block_size", "intra_op_parallelism", "overlap_events", "queue_depth", "single_submit", "thread_count", "use_gds")
)
_OFFLOAD_PARAM = frozenset(("device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"))
_ZERO_DEVICES: Mapping[str, str] = MappingProxyType({"cpu": "host", "nvme": "nvme"})
_HOW = frozenset(
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
_ONLY: Mapping[str, Callable[[str, Any], None]] = MappingProxyType(
    {
        "ep_size": _one,
        "training_mp_size": _trained_whole,
        **dict.fromkeys(("moe", "moe_experts"), _no_experts),
        "base_dir": _in_the_description,
        "fp16": _precision("float16"),
        "bf16": _precision("bfloat16"),
        "zero_optimization": _of_training("here it is offload='host' or 'nvme', or zero with offload_param"),
        **dict.fromkeys(
            (
                "gradient_accumulation_steps",
                "gradient_clipping",
                "optimizer",
                "scheduler",
                "train_batch_size",
                "train_micro_batch_size_per_gpu",
            ),
            _of_training("leave it out"),
        ),
        **dict.fromkeys(
            (
                "checkpoint_config",
                "ckpt_config",
                "ds_config",
                "ep_group",
                "ep_mp_group",
                "expert_group",
                "expert_mp_group",
                "injection_dict",
                "injection_policy",
                "injection_policy_tuple",
                "mpu",
                "quant",
                "save_mp_checkpoint_path",
            ),
            _off,
        ),
        **dict.fromkeys(("min_out_tokens", "min_tokens"), _only(1)),
        "moe_type": _only("standard"),
        "triangular_masking": _only(True),
    }
)
