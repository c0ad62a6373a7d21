from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from distill_pretrain.eval.calibration import Calibration, bin_sums


def predictions(num: int = 4000, vocab: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities float32[T, V] of an overconfident model, and the labels int64[T]."""
    generator = torch.Generator().manual_seed(3)
    logits = 1.5 * torch.randn(num, vocab, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    return (2 * logits).softmax(-1), labels


def sums_of(probs: torch.Tensor, labels: torch.Tensor, num_bins: int) -> torch.Tensor:
    confidence, top = probs.max(-1)
    return bin_sums(confidence, top == labels, num_bins)


@pytest.mark.parametrize("num_bins", [1, 7, 15, 100])
def test_ece_is_that_of_torchmetrics(num_bins: int) -> None:
    probs, labels = predictions()
    expected = multiclass_calibration_error(
        probs, labels, num_classes=probs.shape[1], n_bins=num_bins, norm="l1"
    )
    found = Calibration(sums=sums_of(probs, labels, num_bins).numpy()).ece
    assert found == pytest.approx(float(expected), abs=2e-6)
    assert found > 0.05


def test_bins_hold_what_lies_in_them() -> None:
    """Position by position, with the bins (a, b] of Guo et al.; a bin nothing falls into says None."""
    confidence = torch.tensor([0.2, 0.20001, 0.4, 0.95, 1.0, 0.0], dtype=torch.float64)
    hits = torch.tensor([True, False, True, True, False, False])
    diagram = Calibration(sums=bin_sums(confidence, hits, 5).numpy()).as_dict()
    assert diagram["bins"] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert diagram["positions"] == [2, 2, 0, 0, 2]
    assert diagram["accuracy"] == [0.5, 0.5, None, None, 0.5]
    assert diagram["confidence"][2:4] == [None, None]
    assert diagram["confidence"][4] == pytest.approx(0.975, abs=1e-7)


def test_state_is_exactly_the_same_in_any_order_and_division() -> None:
    probs, labels = predictions(num=50_000)
    probs = probs.double() ** 1.1  # more digits than float32 has, which a plain sum would round
    whole = sums_of(probs, labels, 15)
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(labels)))
    for parts in (2, 3, 997):
        added = sum(
            sums_of(probs[rows], labels[rows], 15) for rows in torch.tensor_split(order, parts)
        )
        assert torch.equal(added, whole)
    assert float(whole[:, 1].sum()) == pytest.approx(
        float(probs.max(-1)[0].double().sum()), rel=1e-7
    )


def test_a_perfectly_calibrated_model_has_no_error() -> None:
    sums = np.array([[100.0, 25.0, 25.0], [0, 0, 0], [10, 9, 9]])
    assert Calibration(sums=sums).ece == 0
