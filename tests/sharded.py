"""For tests of sharded loading: small checkpoints of several families, and shares cut without the code under test."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from jdsi.models import TransformerSpec
from jdsi.models.spec import AttentionSpec, MlpSpec
from parity import random_torch_model

_SMALL = {"vocab_size": 61, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
_LLAMA = _SMALL | {"hidden_size": 24, "intermediate_size": 56, "max_position_embeddings": 32, "head_dim": 8}
_NEO = _SMALL | {"hidden_size": 24, "max_position_embeddings": 32}
CONFIGS = {
    # Fewer KV heads than ranks; three heads; grouped heads that come out even; everything odd.
    "llama-mqa": ("llama", _LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 1}),
    "llama-3-heads": ("llama", _LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 3}),
    "llama-gqa": ("llama", _LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", _LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 2}),
    "phi3": ("phi3", _LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24}),
    "gpt2": ("gpt2", _SMALL | {"n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 32}),
    "bloom": ("bloom", _SMALL | {"hidden_size": 24, "n_head": 3, "n_layer": 2}),
    "gpt_neox": ("gpt_neox", _NEO | {"intermediate_size": 56, "num_attention_heads": 3, "rotary_pct": 0.5}),
    "falcon-mqa": (
        "falcon",
        _NEO | {"num_attention_heads": 3, "new_decoder_architecture": False, "multi_query": True},
    ),
    "falcon-gqa": (
        "falcon",
        _NEO | {"num_attention_heads": 6, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "bert": (
        "bert",
        {
            "vocab_size": 61,
            "max_position_embeddings": 32,
            "hidden_size": 24,
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "intermediate_size": 56,
            "pad_token_id": 1,
        },
    ),
}


def save(name: str, folder: Path, **changes: object) -> torch.nn.Module:
    """A random model of `CONFIGS` in Hugging Face format."""
    kind, settings = CONFIGS[name]
    config = transformers.AutoConfig.for_model(kind, **(settings | changes))
    auto = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    model = random_torch_model(config, auto)
    model.save_pretrained(folder)
    return model


def _padded(entries: list[int], size: int) -> list[int]:
    assert len(entries) <= size
    return entries + [-1] * (size - len(entries))


def _even(length: int, ranks: int, rank: int) -> list[int]:
    """Plain entries of one rank's share of hidden units or of the vocabulary; -1 is padding."""
    size = length // ranks if length % ranks == 0 else math.ceil(length / ranks / 16) * 16
    return _padded([i for i in range(length) if i // size == rank], size)


def _heads(spec: TransformerSpec, layer: int, ranks: int, rank: int) -> tuple[list[int], list[int]]:
    """Query heads and KV heads of one rank; -1 is padding."""
    attention = spec.layers[layer].of(AttentionSpec)
    kv, group = attention.num_kv_heads, attention.num_heads // attention.num_kv_heads
    if kv >= ranks:
        share = math.ceil(kv / ranks)
        mine = [head for head in range(kv) if head // share == rank]
        queries = [head * group + i for head in mine for i in range(group)]
        return _padded(queries, share * group), _padded(mine, share)
    owners = [r * kv // ranks for r in range(ranks)]
    share = max(math.ceil(group / owners.count(head)) for head in range(kv))
    head = owners[rank]
    among, size = rank - owners.index(head), math.ceil(group / owners.count(head))
    return _padded([head * group + i for i in range(group) if i // size == among], share), [head]


def _spread(heads: list[int], dim: int, start: int = 0) -> list[int]:
    return [-1 if head < 0 else start + head * dim + i for head in heads for i in range(dim)]


def share_of(spec: TransformerSpec, name: str, plain: np.ndarray, ranks: int, rank: int) -> np.ndarray:
    """A rank's share of a plain parameter, by indexing it entry by entry."""
    dim, entries = 0, None
    parts = name.split(".")
    if ranks == 1:
        return plain
    if name in ("embedding.tokens.weight", "head.weight", "head.bias"):
        entries = _even(spec.vocab_size, ranks, rank)
    elif parts[0] == "layers" and parts[3] in ("qkv", "out", "up", "down"):
        layer, kind = spec.layers[int(parts[1])], (parts[3], parts[4])
        head_dim = layer.of(AttentionSpec).head_dim
        queries, keys = _heads(spec, int(parts[1]), ranks, rank)
        if kind[0] == "qkv":
            q, k, _ = layer.of(AttentionSpec).qkv_rows
            entries = _spread(queries, head_dim) + _spread(keys, head_dim, q) + _spread(keys, head_dim, q + k)
        elif kind[0] == "up":
            units = _even(layer.of(MlpSpec).width, ranks, rank)
            entries = units
            if layer.of(MlpSpec).gated:
                entries = units + [-1 if i < 0 else i + layer.of(MlpSpec).width for i in units]
        elif kind == ("out", "weight"):
            dim, entries = 1, _spread(queries, head_dim)
        elif kind == ("down", "weight"):
            dim, entries = 1, _even(layer.of(MlpSpec).width, ranks, rank)
    if entries is None:
        return plain
    taken = np.take(plain, [max(entry, 0) for entry in entries], axis=dim)
    padding = [place for place, entry in enumerate(entries) if entry < 0]
    taken[(slice(None),) * dim + (padding,)] = 0
    return taken


@contextmanager
def counted_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Counts the bytes that `os.preadv` returns inside the block."""
    import os

    real, total = os.preadv, [0]

    def preadv(*arguments: object) -> int:
        count = real(*arguments)  # type: ignore[arg-type]
        total[0] += count
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        yield lambda: total[0]
