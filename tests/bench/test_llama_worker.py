"""The parts of the llama.cpp worker that run without llama.cpp."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from checkpoints import save_llama
from jdsi.bench.llama_process import LlamaCpp
from jdsi.bench.llama_worker import gguf_name, interleave_rotary, tensors
from jdsi.errors import ConfigError


def test_rotating_neighbours_after_reordering_is_rotating_halves_before() -> None:
    heads, dim = 3, 8
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((heads * dim, 5)), rng.standard_normal(5)
    turns = np.exp(1j * rng.standard_normal(dim // 2))
    halves = (weight @ x).reshape(heads, 2, dim // 2)
    wanted = (halves[:, 0] + 1j * halves[:, 1]) * turns
    pairs = (interleave_rotary(weight, heads) @ x).reshape(heads, dim // 2, 2)
    np.testing.assert_allclose((pairs[..., 0] + 1j * pairs[..., 1]) * turns, wanted)


def test_every_tensor_of_a_checkpoint_is_read_and_has_a_name(tmp_path: Path) -> None:
    model = save_llama(tmp_path)
    found = dict(tensors(tmp_path))
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, model.get_parameter(name).detach().numpy())
    names = [gguf_name(name) for name in found]
    assert len(set(names)) == len(names)
    assert {"token_embd.weight", "output.weight", "blk.1.attn_q.weight", "blk.0.ffn_down.weight"} <= set(names)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="llama.cpp is installed here")
def test_an_interpreter_without_it_says_what_to_install(tmp_path: Path) -> None:
    save_llama(tmp_path)
    with pytest.raises(ConfigError, match="pip install llama-cpp-python gguf"):
        LlamaCpp(tmp_path, sys.executable)


def test_an_interpreter_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--llama-cpp-python /nowhere/python"):
        LlamaCpp(tmp_path, "/nowhere/python")
