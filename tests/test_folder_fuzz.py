"""Damaged companions of a checkpoint: transformers' answer, or a line that says why not; see `folder_fuzz`."""

from pathlib import Path

import pytest

import folder_fuzz


def test_a_sample_of_mutations(tmp_path: Path) -> None:
    assert folder_fuzz.run(50, 3, tmp_path) == []


@pytest.mark.slow
def test_many_mutations(tmp_path: Path) -> None:
    assert folder_fuzz.run(2000, 4, tmp_path) == []


def test_the_judge_sees_another_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or nothing above could fail."""
    folder = folder_fuzz.folders(tmp_path / "valid")["llama"]
    assert folder_fuzz.judge(folder, "llama", "") is None
    monkeypatch.setattr(folder_fuzz, "TOKENS", [[1, 2, 3]])
    right = folder_fuzz.theirs(folder, "llama")
    monkeypatch.undo()
    monkeypatch.setattr(folder_fuzz, "theirs", lambda *_, **__: right)
    assert str(folder_fuzz.judge(folder, "llama", "")).startswith("shapes")
    right.logits = folder_fuzz.ours(folder).logits + 1e-3
    assert str(folder_fuzz.judge(folder, "llama", "")).startswith("another answer")
    (folder / "config.json").write_text("{}")
    assert folder_fuzz.judge(folder, "llama", "") is None
