from pathlib import Path

import numpy as np
import pytest

from jdsi import ConfigError, InferenceConfig


def test_deepspeed_json_is_understood() -> None:
    config = InferenceConfig.from_dict(
        {
            "dtype": "torch.float32",
            "max_out_tokens": 2048,
            "tensor_parallel": {"tp_size": 1},
            "replace_with_kernel_inject": True,
            "enable_cuda_graph": False,
            "quant": {"enabled": False},
            "zero": {"stage": 0},
            "moe": {"enabled": False, "ep_size": 1},
            "checkpoint": None,
            "min_out_tokens": 1,
            "triangular_masking": True,
            "training_mp_size": 1,
            "moe_experts": [1],
            "moe_type": "standard",
            "injection_dict": None,
            "base_dir": "",
        }
    )
    assert config == InferenceConfig(dtype="float32", max_tokens=2048)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp16", "float16"), ("half", "float16"), ("bf16", "bfloat16"), ("fp32", "float32"), ("auto", "auto")],
)
def test_dtype_names(name: str, dtype: str) -> None:
    assert InferenceConfig(dtype=name).dtype == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dytpe": "float32"}, "'dytpe'.*did you mean 'dtype'"),
        ({"dtype": "int8"}, "int8"),
        ({"max_tokens": 5, "max_out_tokens": 6}, "contradicts"),
        ({"max_tokens": 0}, "at least 1"),
        ({"max_batch_size": 2.5}, "integer"),
        ({"tensor_parallel": {"tp_size": 0}}, "tensor_parallel=0"),
        ({"tensor_parallel": {"size": 2}}, "tp_size"),
        ({"tensor_parallel": {"tp_size": 2, "mpu": object()}}, "mpu"),
        ({"tensor_parallel": 4, "tp": 2}, "contradicts"),
        ({"pipeline_parallel": 2, "offload": "nvme"}, "cannot be combined"),
        ({"tensor_parallel": 2, "sequence_parallel": True, "offload": "nvme"}, "not for offload"),
        ({"tensor_parallel": 2, "parallelism": "auto"}, "leave out tensor_parallel"),
        ({"parallelism": "latnecy"}, "did you mean 'latency'"),
        ({"micro_batches": 2}, "micro_batches is for pipeline_parallel"),
        ({"prompt_pieces": 2}, "prompt_pieces is for pipeline_parallel"),
        ({"sequence_parallel": "yes"}, "sequence_parallel='yes'"),
        ({"sequence_parallel": 1, "tensor_parallel": 2}, "sequence_parallel=1"),
        ({"sequence_parallel": True}, "sequence_parallel is for tensor_parallel"),
        ({"parallelism": "auto", "prompt_pieces": 2}, "prompt_pieces is for pipeline_parallel"),
        ({"tp": {"enabled": "false", "tp_size": 2}}, "enabled='false'"),
        ({"zero": {"offload_parm": {"device": "cpu"}}}, "did you mean 'offload_param'"),
        ({"zero": {"offload_param": {"devise": "cpu"}}}, "offload_param with devise"),
        ({"moe": {"moe_experts": [8]}}, "moe_experts"),
        ({"mpu": object()}, "mpu"),
        ({"training_mp_size": 4}, "training_mp_size"),
        ({"ep_size": 4}, "ep_size=4"),
        ({"zero": 3}, "zero"),
        ({"min_out_tokens": 7}, "min_out_tokens"),
        ({"triangular_masking": False}, "triangular_masking"),
        ({1: 2}, "unknown config key 1"),
        ({"kernels": "pallas"}, "kernels='pallas' must be true or false"),
        ({"mp_size": 1.5}, "tensor_parallel=1.5"),
        ({"mp_size": "two"}, "tensor_parallel='two'"),
        ({"mp_size": "-1"}, "tensor_parallel=-1"),
        ({"mp_size": True}, "tensor_parallel=True"),
        ({"moe": True}, "asks for experts"),
        ({"moe": 1}, "asks for experts"),
        ({"moe_experts": 0}, "asks for moe_experts=0"),
        ({"fp16": True}, "here it is dtype='float16'"),
        ({"bf16": {"loss_scale": 0}}, "here it is dtype='bfloat16'"),
        ({"moe_experts": True}, "asks for experts"),
        ({"moe_experts": [True]}, "asks for"),
        ({"moe_experts": 4}, "asks for moe_experts=4"),
        ({"moe": {"enabled": True}}, "asks for experts"),
        ({"training_mp_size": True}, "training_mp_size"),
        ({"min_tokens": True}, "min_tokens"),
        ({"fp16": {"enabled": True}}, "of DeepSpeed's training configuration; here it is dtype='float16'"),
        ({"bf16": {"enabled": True}}, "here it is dtype='bfloat16'"),
        ({"zero_optimization": {"stage": 3}}, "here it is offload='host' or 'nvme'"),
        ({"train_batch_size": 8}, "leave it out"),
        ({"checkpoint": 5}, "checkpoint=5 must be a folder"),
        ({"base_dir": "/models"}, "'base_dir' in what checkpoint= describes"),
        ({"strict": "yes"}, "strict='yes' must be true or false"),
        ({"moe": {"enabled": True}}, "moe"),
        ({"quant": {"enabled": True}}, "quant"),
        ({"zero": {"stage": 3, "offload_param": {"device": "tape"}}}, "offload_param.device='tape'"),
        ({"offload": "nvme", "zero": {"offload_param": {"device": "cpu"}}}, "contradicts"),
        ({"zero": {"offload_param": {"device": ["cpu"]}}}, "offload_param.device"),
        ({"offload": "nvm"}, "did you mean 'nvme'"),
        ({"memory_limit": "2GiB"}, "memory_limit is for offload"),
        ({"offload": "nvme", "memory_limit": "much"}, "size 'much'"),
        ({"injection_policy": {"Block": "x"}}, "injection_policy"),
    ],
)
def test_what_cannot_be_honoured_is_named(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InferenceConfig.from_dict(options)


def test_numbers_that_come_as_text() -> None:
    """As from an environment: `mp_size=os.environ["WORLD_SIZE"]`."""
    config = InferenceConfig.from_dict({"mp_size": "2", "tensor_parallel": 2, "max_tokens": " 64 ", "ep_size": "1"})
    assert (config.tensor_parallel, config.max_tokens) == (2, 64)
    assert InferenceConfig.from_dict({"moe": 0, "fp16": {"enabled": False}, "bf16": None}) == InferenceConfig()
    assert InferenceConfig.from_dict({"mp_size": "1", "min_tokens": "1", "moe_experts": ["1"]}) == InferenceConfig()
    assert InferenceConfig(max_batch_size="8").max_batch_size == 8  # type: ignore[arg-type]


def test_kernel_injection_is_a_choice_of_ours() -> None:
    assert InferenceConfig.from_dict({"replace_with_kernel_inject": True}).kernels
    assert not InferenceConfig.from_dict({"kernel_inject": False}).kernels


@pytest.mark.parametrize("options", [{"tensor_parallel": {"tp_size": 2}}, {"tp": {"tp_size": 2}}, {"mp_size": 2}])
def test_tensor_parallelism_in_every_spelling(options: dict) -> None:
    assert InferenceConfig.from_dict(options).tensor_parallel == 2
    assert InferenceConfig.from_dict({"tensor_parallel": {}, "mp_size": 2}).tensor_parallel == 2
    assert InferenceConfig.from_dict({"tensor_parallel": {"enabled": False, "tp_size": 2}}).tensor_parallel == 1


def test_zero_offload_is_offload() -> None:
    for device, ours in (("cpu", "host"), ("nvme", "nvme"), ("none", None)):
        config = InferenceConfig.from_dict({"zero": {"stage": 3, "offload_param": {"device": device}}})
        assert config.offload == ours
    assert InferenceConfig(offload="nvme", memory_limit="2GiB").memory_limit == 2**31


def test_overrides_win_whatever_their_spelling() -> None:
    assert InferenceConfig.from_dict({"max_out_tokens": 64}, max_tokens=128).max_tokens == 128
    assert InferenceConfig.from_dict({"max_tokens": np.int64(64)}).max_tokens == 64


def test_config_files_are_read_and_named_when_broken(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"dtype": "bf16"}')
    assert InferenceConfig.read(file, max_tokens=9) == InferenceConfig(dtype="bfloat16", max_tokens=9)
    for text in ("[1]", "{"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"ds\.json"):
            InferenceConfig.read(file)
    with pytest.raises(ConfigError, match=r"absent\.json"):
        InferenceConfig.read(tmp_path / "absent.json")
