"""What a classifier's outputs say."""

import numpy as np
import pytest
import torch

from jdsi.generation import Classification
from jdsi.models.spec import ClassifierSpec

LABELS = ("a", "b", "c")


@pytest.mark.parametrize("scores", ["softmax", "sigmoid", "identity"])
def test_scores(scores: str) -> None:
    spec = ClassifierSpec(LABELS, "tanh", scores=scores)  # type: ignore[arg-type]
    functions = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid, "identity": lambda x: x}
    rows = np.array([[0.5, 3.0, -2.0], [1e4, -1e4, 0], [-200.0, -200.0, -200.0], [88.8, 200.0, 3e38]], np.float32)
    for logits, wanted in zip(rows, functions[scores](torch.tensor(rows)).numpy(), strict=True):
        found = Classification.of(spec, logits)
        np.testing.assert_allclose(found.scores, wanted, rtol=1e-5, atol=1e-7)
        assert found.scores.dtype == np.float32
        assert found.label == LABELS[logits.argmax()]
        assert found.score == found.scores[logits.argmax()]
        shown = found.as_dict()
        assert shown["labels"] == list(LABELS)
        assert (shown["label"], shown["score"], shown["logits"]) == (found.label, found.score, logits.tolist())


def test_a_classifier_has_something_to_say() -> None:
    for labels, activation in ((None, None), ((), "tanh")):
        with pytest.raises(ValueError, match="needs labels, a dense layer"):
            ClassifierSpec(labels, activation)
