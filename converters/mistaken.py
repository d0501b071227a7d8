"""What people give for a checkpoint and is none, named with what to do."""

from pathlib import Path

from jdsi.errors import CheckpointError

GGUF = "a GGUF file, which cannot be read; give the folder of the model in Hugging Face format"
_POINTER = b"version https://git-lfs.github.com/spec/"


def explain_folder(folder: Path) -> str | None:
    """What a folder without a model is, and what to do; `None` if it is nothing known."""
    if (folder / "adapter_config.json").is_file():
        return (
            "an adapter (PEFT) without the model itself; merge it into its base model with peft's merge_and_unload(), "
            "save that, and give the new folder"
        )
    if any(folder.glob("*.gguf")):
        return f"holds {GGUF}"
    if inside := sorted(child.name for child in folder.iterdir() if (child / "config.json").is_file()):
        shown = ", ".join(inside[:20])
        return f"holds no model itself; give one of the folders in it that do: {shown}"
    return None


def refuse_pointer(path: Path, start: bytes | None = None) -> None:
    """Refuses what a clone without git-lfs has in place of a large file.

    Args:
        path: the file.
        start: its first bytes if they are known, at least 8.

    Raises:
        CheckpointError: it is such a pointer.
    """
    if start is None:
        try:
            with open(path, "rb") as file:
                start = file.read(len(_POINTER))
        except OSError:  # whoever reads it has a better message
            return
    if len(start) >= 8 and _POINTER.startswith(start[: len(_POINTER)]):
        raise CheckpointError(
            f"{path}: a git-lfs pointer in place of the file; `git lfs pull` in its folder fetches the file itself"
        )
