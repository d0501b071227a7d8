"""DeepSpeed Inference on JAX/XLA: load a PyTorch checkpoint and run it fast on whatever is there.

Load and generate in three lines:

    import jdsi
    engine = jdsi.init_inference("path/to/checkpoint")
    print(engine.generate("The capital of France is")[0].text)

Importing it alone imports not even JAX: its names, and modules such as `jdsi.sharding`, come at their first use.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jdsi._public import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        if name != "__all__" and name.startswith("_"):  # what Python and its tools ask any module for
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        public = importlib.import_module(f"{__name__}._public")
        if not hasattr(public, name):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals().setdefault(name, getattr(public, name))

    def __dir__() -> list[str]:
        return sorted({*globals(), *importlib.import_module(f"{__name__}._public").__all__})
