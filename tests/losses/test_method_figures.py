"""Figures of the method that need no language model: a Zipf toy, and students of a Bayes-optimal teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from distill_pretrain.contracts import RaggedTargets, SparseTargets
from distill_pretrain.kernels.sparse_kd.settings import LossSettings
from distill_pretrain.losses.sparse_kd import sparse_kd_loss
from distill_pretrain.sampling.samplers import sample_targets

VOCAB = 100_000
K = 20
NUM_POSITIONS = 400


def zipf_logits() -> np.ndarray:
    """float32[V]: t_i ~ 1 / i."""
    return -np.log(np.arange(1, VOCAB + 1)).astype(np.float32)


def test_topk_keeps_a_third_of_a_zipf_teacher_and_overstates_its_head():
    """arXiv 2503.16870's toy: t_1 = .0827, the 20 likeliest hold .2976; renormalised .2780, .1390, .0139."""
    targets = sample_targets(
        zipf_logits()[None], np.zeros(1, np.uint64), sampler="topk", num_draws=K, seed=0
    )
    assert targets.ids.tolist() == list(range(K))
    probs = targets.probs().astype(np.float64)
    assert probs[0] == pytest.approx(0.0827, abs=5e-5)
    assert probs.sum() == pytest.approx(0.2976, abs=5e-5)
    renormalised = probs / probs.sum()
    assert renormalised[[0, 1, 19]] == pytest.approx([0.2780, 0.1390, 0.0139], abs=5e-5)


@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
def test_averages_of_sampled_targets_return_the_zipf_teacher(sampler: str):
    """Over 400 positions of 50 draws, rank by rank and for the mass of the tail, within standard errors."""
    n = 50
    targets = sample_targets(
        np.broadcast_to(zipf_logits(), (NUM_POSITIONS, VOCAB)),
        np.arange(NUM_POSITIONS, dtype=np.uint64),
        sampler=sampler,
        num_draws=n,
        seed=1,
    )
    rows = np.repeat(np.arange(NUM_POSITIONS), targets.entries_per_token)
    t = 1 / np.arange(1, VOCAB + 1)
    t /= t.sum()
    assert t[0] == pytest.approx(0.0827, abs=5e-5)
    first = np.bincount(rows, weights=targets.probs() * (targets.ids == 0), minlength=NUM_POSITIONS)
    tail = np.bincount(rows, weights=targets.probs() * (targets.ids >= K), minlength=NUM_POSITIONS)
    for drawn, exact in ((first, t[0]), (tail, t[K:].sum())):
        error = drawn.std(ddof=1) / math.sqrt(NUM_POSITIONS)
        assert abs(drawn.mean() - exact) < 4 * error
    fraction = n * t[0] % 1
    variance = {
        "multinomial": t[0] * (1 - t[0]) / n,
        "systematic": fraction * (1 - fraction) / n**2,
    }
    assert first.var() == pytest.approx(variance[sampler], rel=0.25)


CLASSES, DIMENSIONS, HIDDEN = 128, 16, 64
NOISE = 1.6
STEPS, BATCH = 300, 256
BINS = 20


class Mixture:
    """Gaussian classes with Zipf priors; the Bayes posterior is the teacher.

    Model and figures follow the classifier toy of arXiv 2503.16870, with a teacher that is exact.
    """

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self.means = torch.randn(CLASSES, DIMENSIONS, generator=random) * 0.9
        self.log_prior = torch.log_softmax(-torch.arange(1, CLASSES + 1.0).log(), 0)

    def draw(self, size: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Points fp32[size, D] and classes int64[size]."""
        labels = torch.multinomial(self.log_prior.exp(), size, replacement=True, generator=random)
        noise = torch.randn(size, DIMENSIONS, generator=random)
        return self.means[labels] + NOISE * noise, labels

    def logits(self, points: torch.Tensor) -> torch.Tensor:
        """fp32[size, C]: the posterior up to a constant per row."""
        scores = points @ self.means.T - 0.5 * (self.means**2).sum(1)
        return scores / NOISE**2 + self.log_prior


def padded(targets: RaggedTargets, *, renormalise: bool) -> SparseTargets:
    """Targets as the loss reads them."""
    num_rows, lengths = len(targets.entries_per_token), targets.entries_per_token
    rows = np.repeat(np.arange(num_rows), lengths)
    columns = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    ids = np.full((num_rows, lengths.max()), -1, np.int64)
    probs = np.zeros(ids.shape, np.float32)
    ids[rows, columns], probs[rows, columns] = targets.ids, targets.probs()
    if renormalise:
        probs /= probs.sum(1, keepdims=True)
    return SparseTargets(ids=torch.from_numpy(ids), probs=torch.from_numpy(probs))


def dense(logits: torch.Tensor) -> SparseTargets:
    """The whole teacher."""
    ids = torch.arange(CLASSES).expand(len(logits), CLASSES)
    return SparseTargets(ids=ids, probs=logits.softmax(-1))


@dataclass(frozen=True)
class Student:
    """Held-out figures: cross-entropy and KL(teacher || student) in nats, ECE as a fraction."""

    ce: float
    kl: float
    ece: float


def train(mixture: Mixture, sampler: str, num_draws: int = 0) -> Student:
    """A two-layer network that learns from one kind of target: `full`, or one of the product's samplers."""
    random = torch.Generator().manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(DIMENSIONS, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, CLASSES)
    )
    with torch.no_grad():
        for layer, spread in ((model[0], DIMENSIONS**-0.5), (model[2], 0.01)):
            layer.weight.normal_(0, spread, generator=random)
            layer.bias.zero_()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        points, labels = mixture.draw(BATCH, random)
        teacher = mixture.logits(points)
        if sampler == "full":
            targets = dense(teacher)
        else:
            drawn = sample_targets(
                teacher.numpy(),
                np.arange(step * BATCH, (step + 1) * BATCH, dtype=np.uint64),
                sampler=sampler,
                num_draws=num_draws,
                seed=3,
            )
            targets = padded(drawn, renormalise=sampler == "topk")
        loss, _ = sparse_kd_loss(
            model(points),
            labels,
            targets,
            LossSettings(ce_weight=0.0, kd_weight=1.0),
            vocab_size=CLASSES,
            tensor_group=None,
        )
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
    return held_out(mixture, model)


@torch.no_grad()
def held_out(mixture: Mixture, model: torch.nn.Module) -> Student:
    points, labels = mixture.draw(40_000, torch.Generator().manual_seed(999))
    logprobs = model(points).log_softmax(-1)
    teacher = mixture.logits(points).log_softmax(-1)
    confidence, guess = logprobs.exp().max(-1)
    hit = (guess == labels).float()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS).index_add_(0, bins, hit - confidence)
    return Student(
        ce=-logprobs[torch.arange(len(labels)), labels].mean().item(),
        kl=(teacher.exp() * (teacher - logprobs)).sum(-1).mean().item(),
        ece=(gaps.abs().sum() / len(labels)).item(),
    )


@pytest.fixture(scope="module")
def students() -> dict[str, Student]:
    mixture = Mixture()
    kinds = [("full", 0), ("multinomial", 12), ("systematic", 12), ("topk", 3), ("topk", 8)]
    return {f"{name}-{n}": train(mixture, name, n) for name, n in kinds}


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["multinomial", "systematic"])
def test_students_of_sampled_targets_are_as_good_as_of_the_whole_teacher(students, sampler):
    full, student = students["full-0"], students[f"{sampler}-12"]
    assert student.ce == pytest.approx(full.ce, abs=0.02)
    assert student.kl < full.kl + 0.02
    assert student.ece < 0.02


@pytest.mark.slow
def test_students_of_few_likeliest_ids_are_miscalibrated(students):
    full, few, more = students["full-0"], students["topk-3"], students["topk-8"]
    assert few.ece > 4 * max(full.ece, students["systematic-12"].ece)
    assert few.ece > 0.05
    assert few.ece > more.ece
    assert few.ce > more.ce > full.ce + 0.02
