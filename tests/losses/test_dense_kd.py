"""The online teacher's loss: value and gradient against float64 autograd of the definitions."""

from __future__ import annotations

import pytest
import torch

from distill_pretrain.contracts import SparseTargets, TokenBatch
from distill_pretrain.kernels.sparse_kd.settings import LossSettings
from distill_pretrain.losses import dense_kd
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.losses.dense_kd import TeacherObjective, dense_kd_loss
from distill_pretrain.losses.sparse_kd import DistillationObjective
from distill_pretrain.processes.process import process_group
from tests.support.distributed import run_distributed

V, PADDED, L, B = 37, 48, 11, 3
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")
SETTINGS = [
    {},
    {"ce_weight": 0.0, "temperature": 2.5},
    {"temperature": 0.7, "temperature_squared": False, "z_loss": 0.05},
    {"smoothing": 0.2, "token_weighting": "teacher_confidence", "temperature": 1.7},
]


def make_case(seed, padded=PADDED):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(L, B, padded, generator=g) * 3
    teacher = torch.randn(B, L, V, generator=g) * 3
    labels = torch.randint(0, V, (L, B), generator=g)
    labels[torch.rand(L, B, generator=g) < 0.2] = -100
    return logits, teacher, labels


def dense_terms(logits, teacher, labels, divergence, settings):
    """Loss and divergence per position, float64[L, B], by their definitions."""
    z, x = logits[..., :V].double(), teacher.transpose(0, 1).double()
    q = torch.softmax(z / settings.temperature, -1)
    t = torch.softmax(x / settings.temperature, -1)
    t = (1 - settings.smoothing) * t + settings.smoothing / V
    m = (q + t) / 2
    value = {
        "forward_kl": (t * (t / q).log()).sum(-1),
        "reverse_kl": (q * (q / t).log()).sum(-1),
        "jensen_shannon": ((t * (t / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2,
    }[divergence]
    lse = torch.logsumexp(z, -1)
    ce = lse - z.gather(-1, labels.clamp(min=0).unsqueeze(-1))[..., 0]
    scale = settings.kd_weight
    if settings.temperature_squared:
        scale *= settings.temperature**2
    if settings.token_weighting == "teacher_confidence":
        scale = scale * torch.softmax(x, -1).amax(-1)
    loss = settings.ce_weight * ce + scale * value + settings.z_loss * lse**2
    return loss * (labels >= 0), value * (labels >= 0)


def run(logits, teacher, labels, divergence, settings, group=None):
    z = logits.clone().requires_grad_()
    loss, terms = dense_kd_loss(
        z,
        labels,
        lambda sequence: teacher[sequence],
        divergence=divergence,
        settings=settings,
        vocab_size=V,
        tensor_group=group,
    )
    row_weights = torch.linspace(0.5, 1.5, L * B).reshape(L, B)
    (loss * row_weights).sum().backward()
    return loss.detach(), terms, z.grad


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_and_gradient_equal_the_float64_definition(divergence, settings, monkeypatch):
    monkeypatch.setattr(dense_kd, "CHUNK_ELEMENTS", 4 * PADDED)  # several chunks per sequence
    settings = LossSettings(**{"ce_weight": 0.3, "kd_weight": 0.7} | settings)
    for seed in range(3):
        logits, teacher, labels = make_case(seed)
        exact = logits.double().requires_grad_()
        expected, value = dense_terms(exact, teacher, labels, divergence, settings)
        (expected * torch.linspace(0.5, 1.5, L * B).reshape(L, B)).sum().backward()
        loss, terms, grad = run(logits, teacher, labels, divergence, settings)
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=5e-6)
        torch.testing.assert_close(terms[1].double(), value.detach(), rtol=1e-5, atol=5e-6)
        torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_padding_columns_and_ignored_labels_get_no_gradient(divergence):
    logits, teacher, labels = make_case(0)
    logits[..., V:] = 1e4
    settings = LossSettings(ce_weight=0.5, kd_weight=0.5, z_loss=0.1)
    loss, terms, grad = run(logits, teacher, labels, divergence, settings)
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all()
    assert grad[..., V:].abs().max() == 0
    assert grad[labels < 0].abs().max() == 0
    assert loss[labels < 0].abs().max() == 0 and terms[:, labels < 0].abs().max() == 0


def test_a_perfect_student_has_no_divergence_and_no_gradient():
    _, teacher, labels = make_case(1)
    logits = torch.nn.functional.pad(teacher.transpose(0, 1) + 7.0, (0, PADDED - V))
    for divergence in DIVERGENCES:
        _, terms, grad = run(
            logits, teacher, labels, divergence, LossSettings(ce_weight=0.0, kd_weight=1.0)
        )
        assert terms[1].abs().max() < 2e-6 and grad.abs().max() < 1e-6


def test_a_second_backward_is_refused():
    logits, teacher, labels = make_case(1)
    z = logits.clone().requires_grad_()
    loss, _ = dense_kd_loss(
        z,
        labels,
        lambda sequence: teacher[sequence],
        divergence="forward_kl",
        settings=LossSettings(ce_weight=1.0, kd_weight=1.0),
        vocab_size=V,
        tensor_group=None,
    )
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


class FixedTeacher:
    """Logits that depend on the token alone."""

    vocab_size = V
    device = torch.device("cpu")

    def __init__(self):
        self.table = torch.randn(V, V, generator=torch.Generator().manual_seed(9)) * 2

    def logits(self, tokens):
        return self.table[tokens]


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0, "z_loss": 0.1}], ids=str)
def test_the_objective_equals_that_of_targets_on_the_whole_vocabulary(settings):
    logits, _, labels = make_case(2)
    tokens = torch.randint(0, V, (B, L), generator=torch.Generator().manual_seed(1))
    teacher = FixedTeacher()
    probs = teacher.logits(tokens).softmax(-1)
    probs[labels.T < 0] = 0.0  # as in a cache: no label, no target
    ids = torch.arange(V).expand(B, L, V).masked_fill((labels.T < 0)[..., None], -1)
    config = {"ce_weight": ((1, 0.0), (11, 1.0)), "kd_weight": 0.7, **settings}
    common = {"vocab_size": V, "tensor_group": None}
    online = TeacherObjective(teacher, ObjectiveConfig(**config, target="teacher"), **common)
    cached = DistillationObjective(ObjectiveConfig(**config), **common)
    sums, grads = [], []
    for objective, targets in ((online, None), (cached, SparseTargets(ids=ids, probs=probs))):
        objective.begin_step(6)
        z = logits.clone().requires_grad_()
        terms = objective(z, TokenBatch(tokens=tokens, labels=labels.T, targets=targets))
        assert len(terms) == len(objective.term_names) == 3 + ("z_loss" in settings)
        terms[0].backward()
        sums.append(terms.detach())
        grads.append(z.grad)
    assert sums[0][0].item() == pytest.approx(
        0.5 * sums[0][1].item()
        + 0.7 * settings.get("temperature", 1.0) ** 2 * sums[0][2].item()
        + (0.1 * sums[0][3].item() if "z_loss" in settings else 0.0),
        rel=1e-5,
    )
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=2e-6)


def sliced_losses() -> list[float]:
    """Largest difference of loss and gradient between this rank's columns and the whole, over all ranks."""
    import torch.distributed as dist

    with process_group():
        group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
        worst = torch.zeros(2, dtype=torch.float64)
        for divergence in DIVERGENCES:
            for number, settings in enumerate(SETTINGS):
                # At padded = 96 the last rank owns padding columns only.
                logits, teacher, labels = make_case(number, padded=(48, 96)[number % 2])
                settings = LossSettings(**{"ce_weight": 0.3, "kd_weight": 0.7} | settings)
                expected, _, whole = run(logits, teacher, labels, divergence, settings)
                mine = logits.chunk(size, dim=-1)[rank]
                loss, _, grad = run(mine, teacher, labels, divergence, settings, group)
                loss_error = (loss - expected).abs().max()
                grad_error = (grad - whole.chunk(size, dim=-1)[rank]).abs().max()
                worst = torch.maximum(worst, torch.stack((loss_error, grad_error)).double())
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.tolist()


def test_a_vocabulary_split_over_ranks_gives_the_unsplit_loss_and_gradient():
    loss_error, grad_error = run_distributed(sliced_losses, 2)
    assert loss_error < 2e-5
    assert grad_error < 5e-6
