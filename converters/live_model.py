"""A `transformers` model in the memory of PyTorch, read as a checkpoint is, without a file."""

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdsi.errors import ConfigError

from .config import refuse_quantized
from .safetensors_file import TensorInfo
from .torch_file import StateDict, as_numpy


def is_module(model: object) -> bool:
    """Whether something is a PyTorch module; PyTorch is not imported for the question."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


class LiveModel(StateDict):
    """A model's tensors and config. They are read when they are asked for; nothing is kept of what is read.

    Args:
        model: an instance of one of transformers' own classes.
        weightless: whether only its config counts, and its tensors may be on the meta device.

    Attributes:
        config: the model's, naming its class.
        label: its class's name.

    Raises:
        ConfigError: it is another module, of another family, or does not compute what its class and config say, as far
            as its own `forward`s and the rotary frequencies tell.
    """

    def __init__(self, model: Any, *, weightless: bool = False) -> None:
        kind = type(model)
        self.label = f"the {kind.__name__} in memory"
        _check_class(model, self.label)
        self.config = copy.deepcopy(model.config)
        self.config.architectures = [kind.__name__]
        refuse_quantized(self.label, getattr(model.config, "quantization_config", None))
        _check_forward(model, self.label)
        if not weightless:
            _check_rotary(model, self.label)
        self._state: Mapping[str, Any] = {} if weightless else model.state_dict()
        if empty := [name for name, tensor in self._state.items() if tensor.is_meta]:
            raise ConfigError(
                f"{self.label}: {len(empty)} tensors are on the meta device and have no values, {empty[0]} for one; "
                "name the weights with checkpoint=, or load the model before"
            )
        place = Path(kind.__name__)
        self.tensors = {
            name: TensorInfo(name, as_numpy(place, name, tensor[:0].cpu() if tensor.ndim else tensor.cpu()).dtype,
                             tuple(tensor.shape), place)
            for name, tensor in self._state.items()
        }  # fmt: skip

    def _array(self, name: str) -> np.ndarray:
        tensor = self._state[name]
        return as_numpy(Path(self.label), name, tensor.cpu())


def _check_class(model: Any, label: str) -> None:
    from transformers import PreTrainedModel

    kind = type(model)
    if hasattr(model, "merge_and_unload") or getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(f"{label} has adapters (PEFT); merge_and_unload() gives the model that can be read")
    inner = getattr(model, "module", None)
    if isinstance(inner, PreTrainedModel):
        raise ConfigError(f"{label} wraps a {type(inner).__name__}; give that, its .module")
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"{label} is a PyTorch module of {kind.__module__}; give a transformers model, a folder, a hub id or "
            "a jdsi Transformer"
        )
    if not kind.__module__.startswith("transformers.models."):
        raise ConfigError(
            f"{label} is a class of {kind.__module__}, not of transformers itself, and may compute something else; "
            "give an instance of the class it is made after"
        )


def _check_forward(model: Any, label: str) -> None:
    """Refuses instances that were given another `forward`; what accelerate's hooks put there computes the same."""
    for name, module in model.named_modules():
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            where = f"its {name} has" if name else "it has"
            raise ConfigError(f"{label}: {where} a forward of its own, which may compute something else; remove that")


def _check_rotary(model: Any, label: str) -> None:
    """Refuses frequencies, which are not in the state dict, that are not those of the config as it is now."""
    for name, module in model.named_modules():
        ours = getattr(module, "original_inv_freq", getattr(module, "inv_freq", None))
        if ours is None or getattr(module, "config", None) is None or ours.is_meta:
            continue
        try:
            fresh = type(module)(model.config)
        except Exception as error:  # whatever transformers finds when it makes something of the values
            raise ConfigError(f"{label}: its config describes no {type(module).__name__}: {error!r}") from error
        right = getattr(fresh, "original_inv_freq", fresh.inv_freq)
        scales = [getattr(rotary, "attention_scaling", 1.0) for rotary in (module, fresh)]
        # A model that was cast has them rounded to its type.
        if (
            ours.shape != right.shape
            or scales[0] != scales[1]
            or not np.allclose(ours.float().cpu().numpy(), right.float().cpu().numpy(), rtol=1e-2, atol=0)
        ):
            raise ConfigError(
                f"{label}: the rotary frequencies of its {name} are not those of its config, which was changed after "
                "it was made; make it anew of that config"
            )
