"""transformers without PyTorch, for processes that are ours from their start to their end."""

import sys


def import_transformers_without_torch() -> None:
    """Imports transformers as it is where PyTorch is not installed, for the rest of the process.

    Its tokenizers and configs need no PyTorch, and import it wherever they find it: a second, and hundreds of
    megabytes. It looks once, so a process in which others may want transformers' models must not do this. PyTorch can
    still be imported afterwards, as for `.bin` files. Where either has been imported already, all stays as it is.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # what makes Python say that there is none
    try:
        import transformers  # noqa: F401
        from transformers.utils.import_utils import is_torch_available

        is_torch_available()  # remembers what it finds
    finally:
        del sys.modules["torch"]
