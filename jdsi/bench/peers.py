"""Other programs on the same weights, behind one protocol."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, Self

from jdsi.errors import ConfigError, nearest

from .llama_process import LlamaCpp
from .report import processors


class Peer(Protocol):
    """A program that generates greedily from token ids with a given checkpoint, deaf to end-of-sequence tokens."""

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """The new tokens of each prompt; prompts have equal lengths."""
        ...

    def close(self) -> None:
        """Ends what the peer started."""
        ...


class Transformers:
    """Hugging Face transformers on PyTorch, with as many threads as we may use.

    Args:
        model: a causal language model of theirs.
        device: where it is.
    """

    def __init__(self, model: Any, device: str) -> None:
        import torch

        self._torch, self._model, self._device = torch, model.eval(), device

    @classmethod
    def load(cls, folder: Path, dtype: str) -> Self:
        """The model in a folder, where JAX's arrays are.

        Raises:
            ConfigError: PyTorch is not installed.
        """
        torch, transformers = _torch()
        import jax

        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        return cls(model.to(device), device)

    @classmethod
    def random(cls, config: Any, dtype: str, device: str) -> Self:
        """A model with random weights, which are made on the device.

        Raises:
            ConfigError: PyTorch is not installed.
        """
        torch, transformers = _torch()
        with torch.device(device), torch.no_grad():
            model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.02)
        return cls(model, device)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, *, compiled: bool = False) -> list[list[int]]:
        """See `Peer`; `compiled` is what `torch.compile` makes of it with a cache of fixed size."""
        torch = self._torch
        static = {"cache_implementation": "static", "compile_config": self._compile_config()} if compiled else {}
        tokens = torch.tensor([list(p) for p in prompts], device=self._device)
        # Ids that end a sequence or pad it, which a checkpoint may bring along, must not shorten the work.
        self._model.generation_config.eos_token_id = None
        with torch.inference_mode():
            out = self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                **static,
            )
        return out[:, tokens.shape[1] :].tolist()

    def next_token(self, prompt: Sequence[int]) -> int:
        """The token after a prompt: one forward pass that fills the cache and computes the last logits only."""
        return self.next_tokens([prompt])[0]

    def next_tokens(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """As `next_token`, of prompts of equal length."""
        torch = self._torch
        with torch.inference_mode():
            tokens = torch.tensor([list(prompt) for prompt in prompts], device=self._device)
            return self._model(tokens, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()

    def _compile_config(self) -> Any:
        from transformers.generation.configuration_utils import CompileConfig

        config: Any = CompileConfig()
        config._compile_all_devices = True  # else a CPU would compile nothing, without a word
        return config

    def close(self) -> None:
        """See `Peer`; nothing to end here."""


def _torch() -> tuple[Any, Any]:
    """PyTorch and transformers, set up."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("peer 'transformers' needs PyTorch, which is not installed: pip install 'jdsi[torch]'")
    import torch
    import transformers

    torch.set_num_threads(processors())
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


def _transformers(folder: Path, dtype: str, _: str | None) -> Peer:
    return Transformers.load(folder, dtype)


def _llama_cpp(folder: Path, dtype: str, python: str | None) -> Peer:
    if dtype != "float32":
        raise ConfigError(f"peer 'llama.cpp' is measured in float32 only, not in {dtype}")
    return LlamaCpp(folder, python)


PEERS: Mapping[str, Callable[[Path, str, str | None], Peer]] = MappingProxyType(
    {"transformers": _transformers, "llama.cpp": _llama_cpp}
)


def check_peers(names: Sequence[str], known: Sequence[str] = tuple(PEERS)) -> None:
    """Raises `ConfigError` for a name that is not among `known`."""
    for name in names:
        if name not in known:
            raise ConfigError(f"peer {name!r} is not known{nearest(name, known)}; known are {', '.join(known)}")


def open_peers(names: Sequence[str], folder: Path, dtype: str, llama_cpp_python: str | None) -> dict[str, Peer]:
    """The peers by name, loaded.

    Args:
        llama_cpp_python: the Python that has `llama-cpp-python`, `gguf` and `numpy`; by default the running one.

    Raises:
        ConfigError: a peer is not known, not installed, or cannot run this model; the message says what to install.
    """
    check_peers(names)
    opened: dict[str, Any] = {}
    try:
        for name in dict.fromkeys(names):
            opened[name] = PEERS[name](folder, dtype, llama_cpp_python)
    except BaseException:
        close_peers(opened)
        raise
    return opened


def close_peers(peers: Mapping[str, Peer]) -> None:
    """Ends all of them."""
    for peer in peers.values():
        peer.close()
