"""Finding JAX's CUDA compiler beside an environment."""

import os
import sys
from pathlib import Path

import pytest

from jdsi import cuda_compiler


def test_it_is_found_only_where_it_lies_and_keeps_jax_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(cuda_compiler, "_PLUGIN", "jax_cuda_of_a_test")
    monkeypatch.setattr(cuda_compiler, "FOLDER", tmp_path)
    before = list(sys.path)
    for name in ("JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"):
        monkeypatch.delenv(name, raising=False)

    assert not cuda_compiler.find_cuda_compiler()
    assert sys.path == before
    assert "JAX_PLATFORMS" not in os.environ
    assert f"--target {tmp_path} jax-cuda13-plugin==1.2 jax-cuda13-pjrt==1.2" in cuda_compiler.remedy("1.2")

    (tmp_path / "jax_cuda_of_a_test").mkdir()
    (tmp_path / "jax_cuda_of_a_test" / "__init__.py").touch()
    assert "before importing JAX" in cuda_compiler.remedy("1.2")
    assert cuda_compiler.find_cuda_compiler()
    assert sys.path == [*before, str(tmp_path)]
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] == "1"

    assert cuda_compiler.find_cuda_compiler(), "what is found need not be found again"
    assert sys.path == [*before, str(tmp_path)]
    monkeypatch.setattr(sys, "path", before)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert cuda_compiler.find_cuda_compiler()
    assert os.environ["JAX_PLATFORMS"] == "cuda,cpu", "what someone asked for stays"
