"""All operators, with the arguments they are compiled, timed and tuned on."""

import dataclasses
import importlib
from collections.abc import Mapping
from types import MappingProxyType

from .operator import ArgumentSpec, Operator

# Where each is: the package, and the function of its module `specs` that gives the arguments.
_PLACES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "linear": ("linear", "argument_specs"),
        "quantized_linear": ("quantized_linear", "argument_specs"),
        "prefill_attention": ("prefill_attention", "argument_specs"),
        "decode_attention": ("decode_attention", "decode_attention_specs"),
        "paged_decode_attention": ("decode_attention", "paged_decode_attention_specs"),
        "ragged_paged_attention": ("ragged_paged_attention", "argument_specs"),
        "add_norm": ("normalization", "argument_specs"),
        "rotary_kv_write": ("kv_write", "argument_specs"),
    }
)

NAMES = tuple(_PLACES)


@dataclasses.dataclass(frozen=True)
class Entry:
    """An operator and where its argument specs are.

    Attributes:
        operator: the operator.
        specs: name of the function in the package's module `specs`.
    """

    operator: Operator
    specs: str = "argument_specs"

    def argument_specs(self) -> tuple[ArgumentSpec, ...]:
        """The arguments at real sizes of models, in the order they should be reported."""
        return getattr(importlib.import_module(f"{self.operator.package}.specs"), self.specs)()


def operators() -> Mapping[str, Entry]:
    """Every operator by name. Imports their packages, no kernels."""
    package = __name__.rpartition(".")[0]
    found = {}
    for name, (folder, specs) in _PLACES.items():
        api = importlib.import_module(f"{package}.{folder}.api")
        found[name] = Entry(getattr(api, name.upper()), specs)
    return MappingProxyType(found)
