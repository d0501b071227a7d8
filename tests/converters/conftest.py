"""A tiny model in the folders that the tests read."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from jdsi.converters import convert, random_checkpoint


def _tiny_config(**changes: Any) -> LlamaConfig:
    """Odd sizes, grouped heads, untied: nothing lines up by accident."""
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    return LlamaConfig(**settings | changes)


@pytest.fixture
def tiny_config() -> Callable[..., LlamaConfig]:
    """Makes the config of the tiny model, with changes."""
    return _tiny_config


@pytest.fixture(scope="session")
def _stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stored")
    random_checkpoint(root / "hf", _tiny_config(), dtype="float32")
    random_checkpoint(root / "sharded", _tiny_config(), dtype="float32", max_shard_size="40KB")
    (root / "hf" / "tokenizer.json").write_text('{"made": "up"}')
    convert(root / "hf", root / "orbax", to="orbax")
    return root


def _copy(name: str):
    @pytest.fixture
    def folder(_stored: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(_stored / name, tmp_path / f"source_{name}"))

    return folder


hf_folder = _copy("hf")
sharded_folder = _copy("sharded")
orbax_folder = _copy("orbax")
