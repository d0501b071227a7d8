"""Which arguments of which operators the report proves and times, by the names that their specs have."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from jdsi.errors import ConfigError
from jdsi.pallas_kernels import registry
from jdsi.pallas_kernels.operator import ArgumentSpec

_LLAMA_LAYER = ("qkv", "out", "gate_up", "down")


def _named(names: Iterable[str], end: str = " bfloat16") -> tuple[str, ...]:
    return tuple(f"{name}{end}" for name in names)


PROVEN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "add_norm": ("llama-8b T=8 bfloat16", "opt-30b T=64 float16", "deepseek-v3 T=2048 bfloat16"),
        "rotary_kv_write": (
            "llama-8b decode B=8 contiguous fused bfloat16",
            "llama-8b decode B=8 paged bfloat16",
            "gpt-j prefill T=2048 contiguous float16",
        ),
        "linear": _named(
            (
                "llama-8b out T=1",
                "llama-8b qkv T=8",
                "gpt-2-xl up T=8",
                "llama-8b gate_up T=10",
                "llama-8b down T=64",
                "gpt-2-xl head T=8",
                "llama-8b head T=2",
            )
        ),
        "decode_attention": (
            "llama-8b B=1 L=8192 bfloat16",
            "llama-8b B=8 L=8192 bfloat16",
            "llama-8b B=8 L=8192 int8",
            "gpt-j B=8 L=8192 bfloat16",
            "deepseek-v3 B=8 L=8192 bfloat16",
        ),
        "prefill_attention": (
            "llama-8b B=1 S=512 bfloat16",
            "gpt-2-xl B=1 S=512 float16",
            "bert-large packed B=16 S=512 bfloat16",
            "gpt-j B=1 S=512 float16",
            "phi-2 B=1 S=2048 bfloat16",
        ),
        "quantized_linear": _named(
            (
                "llama-8b attention out int8 channel T=1",
                "llama-8b attention out int4 g128 T=1",
                "llama-8b qkv int4 g32 zeros T=8",
                "deepseek-v3 expert down fp8 blocks T=8",
                "llama-8b gate up int8 channel T=64",
                "llama-8b down int4 g128 T=64",
            )
        ),
        "paged_decode_attention": ("llama-8b B=8 L=8192 page=64 bfloat16", "llama-8b B=8 L=8192 page=64 int8"),
        "ragged_paged_attention": _named(("llama-8b prefill", "llama-8b 4 chunks", "llama-8b chunk and 255 decodes")),
    }
)
"""By operator, the cheapest operator and the cheapest arguments first."""

TIMED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "linear": _named(
            (
                *(f"llama-8b {layer} T=1" for layer in _LLAMA_LAYER),
                *(f"llama-8b {layer} T=8" for layer in _LLAMA_LAYER),
                *(f"llama-8b {layer} T=64" for layer in _LLAMA_LAYER),
                *(f"llama-8b {layer} T=10" for layer in ("out", "down")),
                "llama-8b head T=1",
                "llama-8b head T=8",
                *(f"llama-8b {layer} T={tokens}" for tokens in (2, 4) for layer in ("out", "gate_up")),
                "gpt-2-xl up T=8",
                "opt-30b qkv T=1",
            )
        ),
        "decode_attention": (
            "llama-8b B=1 L=8192 bfloat16",
            "llama-8b B=8 L=8192 bfloat16",
            "llama-8b B=64 L=8192 bfloat16",
            "llama-8b B=1 L=131072 bfloat16",
            "llama-8b B=8 L=32768 int8",
            "deepseek-v3 B=64 L=8192 bfloat16",
        ),
        "prefill_attention": (
            "llama-8b B=1 S=2048 bfloat16",
            "llama-8b B=1 S=8192 bfloat16",
            "phi-2 B=1 S=2048 bfloat16",
            "gpt-j B=1 S=2048 float16",
            "gpt-2-xl B=1 S=2048 float16",
            "deepseek-v3 B=1 S=2048 bfloat16",
        ),
        "quantized_linear": _named(
            (
                "llama-8b gate up int4 g128 T=1",
                "llama-8b gate up int8 channel T=1",
                "llama-8b down int4 g128 T=1",
                "llama-8b attention out int4 g128 T=1",
                "llama-8b gate up int4 g128 T=64",
                "llama-8b gate up int8 channel T=64",
                "llama-8b gate up fp8 blocks T=8",
                "llama-8b gate up int4 g32 zeros T=8",
            )
        ),
        "paged_decode_attention": _named(("llama-8b B=8 L=8192 page=64", "llama-8b B=64 L=8192 page=128")),
        "ragged_paged_attention": _named(
            ("llama-8b 256 decodes", "llama-8b chunk and 255 decodes", "llama-8b prefill")
        ),
        "add_norm": _named(("llama-8b T=8", "llama-8b T=2048")),
        "rotary_kv_write": _named(("llama-8b decode B=8 contiguous fused", "llama-8b prefill T=2048 contiguous fused")),
    }
)
"""By operator, in order of value."""


def specs_of(operator: str, names: Iterable[str]) -> list[ArgumentSpec]:
    """The argument specs of an operator that have these names, in this order.

    Raises:
        ConfigError: one is not there any more.
    """
    known = {spec.name: spec for spec in registry.operators()[operator].argument_specs()}
    try:
        return [known[name] for name in names]
    except KeyError as error:
        raise ConfigError(f"operator {operator!r} has no arguments named {error.args[0]!r}") from error
