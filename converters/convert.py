"""Converting between checkpoint layouts in bounded memory."""

from pathlib import Path
from typing import Any

from .destination import check_destination
from .location import resolve
from .progress import Progress
from .save import ConversionReport, Form, Layout, save_parameters
from .stored_model import open_model


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Layout,
    dtype: Any = None,
    tensor_parallel: int | None = None,
    max_shard_size: int | str = "5GB",
    quantize: str | None = None,
    group_size: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a checkpoint to one of our folders or to the Hugging Face layout.

    Peak memory over the base process is the largest tensor group (a layer, or the embedding) and a constant, whatever
    the model's size. The destination appears only when it is complete and on disk.

    Args:
        source: a Hugging Face folder or hub id, or a folder that this function made.
        destination: the folder to make.
        to, tensor_parallel, max_shard_size, quantize, group_size, overwrite, progress: as for `save_parameters`.
        strict: whether tensors that the model does not use are an error, and not left out with a warning.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; `None` keeps every parameter's type, and the way back is then
            bit-exact for all that is not quantised. What is one parameter here (queries, keys and values) gets the
            type that holds those of all its parts.

    Raises:
        CheckpointError: the source is missing, damaged or does not fit its config, or holds NaN or infinity where it is
            to be quantised; the destination exists, cannot be written or is not apart from the source; the disk is
            full.
        ConfigError: the family or an option is not supported, or the source is to be quantised and already is.

    Warns:
        JdsiWarning: see `open_model`.
        NonFiniteWarning: tensors hold NaN or infinity; they are converted as they are.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "tensor_parallel": tensor_parallel,
        "max_shard_size": max_shard_size,
        "quantize": quantize,
        "group_size": group_size,
    }
    Form.of(to, **options)  # what can be refused is, before a hub id is downloaded
    local = Path(source) if Path(source).exists() else None
    check_destination(Path(destination), overwrite=overwrite, source=local)
    folder = resolve(source)
    return save_parameters(
        open_model(folder, strict=strict).parameters,
        destination,
        like=folder,
        to=to,
        overwrite=overwrite,
        progress=progress,
        **options,
    )
