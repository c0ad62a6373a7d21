from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fake_models import NUM_DRAWS, VOCAB, RandomPlan, TableEngine

from distill_pretrain.contracts import SparseTargets
from distill_pretrain.eval.gradients import GradientBatch, compare_gradients

HIDDEN = 6


class TwoLayers:
    """tokens -> embedding -> head, and a parameter that no logit depends on."""

    vocab_size = VOCAB
    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(VOCAB, HIDDEN), (HIDDEN, VOCAB), (3,)]
        self.parameters = [
            torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes
        ]

    def logits_with_grad(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.parameters[0][tokens] @ self.parameters[1]


def teacher_probs(teacher: TableEngine, tokens: torch.Tensor) -> np.ndarray:
    """float64[B, L, V]."""
    return np.array([[teacher.probs(token) for token in row] for row in tokens.tolist()])


def sampled(probs: np.ndarray, labels: torch.Tensor, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    flat = probs.reshape(-1, VOCAB)
    counts = np.stack([rng.multinomial(NUM_DRAWS, row / row.sum()) for row in flat])
    return counts.reshape(probs.shape) / NUM_DRAWS


def truncated(probs: np.ndarray, k: int) -> np.ndarray:
    threshold = np.sort(probs, -1)[..., -k, None]
    kept = np.where(probs >= threshold, probs, 0)
    return kept / kept.sum(-1, keepdims=True)


def sparse(dense: np.ndarray) -> SparseTargets:
    """Every id with mass, padded with -1."""
    k = int((dense > 0).sum(-1).max())
    ids = np.argsort(-dense, -1)[..., :k]
    values = np.take_along_axis(dense, ids, -1)
    return SparseTargets(
        ids=torch.from_numpy(np.where(values > 0, ids, -1)), probs=torch.from_numpy(values).float()
    )


def batches(count: int, teacher: TableEngine) -> tuple[list[GradientBatch], list[dict]]:
    """Micro-batches of two sequences, and their targets as dense float64[B, L, V]."""
    plan, made, dense = RandomPlan(2 * count), [], []
    for number in range(count):
        tokens, labels = map(torch.from_numpy, plan.read(np.arange(2 * number, 2 * number + 2)))
        probs = teacher_probs(teacher, tokens)
        targets = {"draws": sampled(probs, labels, number), "top3": truncated(probs, 3)}
        dense.append({"full": probs, **targets})
        made.append(
            GradientBatch(
                tokens=tokens.long(),
                labels=labels.long(),
                targets={name: sparse(target) for name, target in targets.items()},
            )
        )
    return made, dense


def reference(made: list[GradientBatch], dense: list[dict], name: str) -> torch.Tensor:
    """Flat float64 gradient of the mean KL over the labelled positions of all batches, in one graph."""
    student = TwoLayers(torch.float64)
    terms = []
    for batch, targets in zip(made, dense, strict=True):
        log_p = torch.log_softmax(student.logits_with_grad(batch.tokens), -1)
        target = torch.from_numpy(targets[name])
        kl = (torch.xlogy(target, target) - target * log_p).sum(-1)
        terms.append(kl[batch.labels >= 0])
    gradients = torch.autograd.grad(torch.cat(terms).mean(), student.parameters[:2])
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_angle_and_ratio_equal_a_float64_reference_over_growing_batches() -> None:
    teacher = TableEngine(9)
    made, dense = batches(5, teacher)
    found = compare_gradients(TwoLayers(), teacher, iter(made), num_batches=(4, 1))
    assert list(found) == ["draws", "top3"]
    for name, rows in found.items():
        assert [row["num_batches"] for row in rows] == [1, 4]
        for row in rows:
            used = made[: row["num_batches"]], dense[: row["num_batches"]]
            mine, full = reference(*used, name), reference(*used, "full")
            cosine = torch.nn.functional.cosine_similarity(mine, full, dim=0)
            assert row["angle_degrees"] == pytest.approx(math.degrees(math.acos(cosine)), abs=0.01)
            assert row["norm_ratio"] == pytest.approx(float(mine.norm() / full.norm()), rel=1e-4)
            assert row["num_positions"] == sum(int((b.labels >= 0).sum()) for b in used[0])


def test_noise_averages_out_and_bias_does_not() -> None:
    teacher = TableEngine(9)
    made, _ = batches(128, teacher)
    found = compare_gradients(TwoLayers(), teacher, made, num_batches=(1, 128))
    angles = {name: [row["angle_degrees"] for row in rows] for name, rows in found.items()}
    assert angles["draws"][1] < 0.4 * angles["draws"][0]
    assert angles["top3"][1] > 0.6 * angles["top3"][0]
    assert angles["draws"][1] < angles["top3"][1]


def test_the_whole_distribution_as_a_cache_has_angle_zero() -> None:
    teacher = TableEngine(9)
    made, dense = batches(2, teacher)
    exact = [
        GradientBatch(tokens=b.tokens, labels=b.labels, targets={"all": sparse(d["full"])})
        for b, d in zip(made, dense, strict=True)
    ]
    (row,) = compare_gradients(TwoLayers(), teacher, exact, num_batches=(2,))["all"]
    assert row["angle_degrees"] < 0.1
    assert row["norm_ratio"] == pytest.approx(1, abs=1e-4)
