"""The loss of a model that caps its logits: that of cap tanh(z / cap), and its gradient by z, by every way to it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from distill_pretrain.contracts import SparseTargets, TokenBatch
from distill_pretrain.kernels.sparse_kd import stages
from distill_pretrain.kernels.sparse_kd.cap import cap_slope, soft_capped
from distill_pretrain.kernels.sparse_kd.settings import LossSettings
from distill_pretrain.losses.backend import LossBackend
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.losses.dense_kd import TeacherObjective, dense_kd_loss
from distill_pretrain.losses.positions import row_entropies
from distill_pretrain.losses.sparse_kd import DistillationObjective, sparse_kd_loss
from distill_pretrain.processes.process import process_group
from tests.losses.cases import make_case
from tests.support.distributed import run_distributed
from tests.support.emulation import emulated

V, CAP = 37, 3.0
BASE = LossSettings(ce_weight=0.3, kd_weight=0.7, logit_cap=CAP)
FORMS = {
    "drop": replace(BASE, z_loss=0.02),
    "ghost": replace(BASE, residual="ghost", temperature=2.0, smoothing=0.1),
    "uniform": replace(BASE, residual="uniform", temperature=0.7),
    "decoupled": replace(BASE, residual="decoupled", temperature=2.0, tail_weight=0.4),
    "reverse": replace(BASE, residual="ghost", divergence="reverse_kl"),
    "labels alone": replace(BASE, kd_weight=0.0),
}


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    monkeypatch.setattr(stages, "launcher_for", lambda source, device: emulated(source))


def capped(z):
    """By torch's own operations, in the type of z."""
    return CAP * torch.tanh(z / CAP)


def loss_of(z, labels, targets, settings, backend="reference", group=None):
    return sparse_kd_loss(
        *(z, labels, targets if settings.kd_weight else None, settings),
        vocab_size=V,
        tensor_group=group,
        implementation=LossBackend(name=backend),
    )


@pytest.mark.parametrize("backend", ["reference", "cuda"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_loss_of_the_capped_logits_and_its_gradient_goes_through_the_cap(
    dtype, form, backend
):
    settings = FORMS[form]
    # With logits of 12 the cap is all but reached.
    for seed, scale in ((0, 1.0), (1, 4.0), (2, 12.0)):
        logits, labels, targets = make_case(seed, mass="truncated", scale=scale)
        logits = logits.to(dtype)
        weights = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed)) + 0.5
        exact = logits.double().requires_grad_()
        seen = capped(exact)
        inner = seen.detach().float().requires_grad_()
        expected, expected_terms = loss_of(inner, labels, targets, replace(settings, logit_cap=0.0))
        (expected * weights).sum().backward()
        seen.backward(inner.grad.double())
        z = logits.clone().requires_grad_()
        losses, terms = loss_of(z, labels, targets, settings, backend)
        (losses * weights).sum().backward()
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=5e-6)
        torch.testing.assert_close(terms, expected_terms, rtol=1e-5, atol=5e-6)
        rounding = {torch.float32: 1e-5, torch.bfloat16: 5e-3}[dtype]
        torch.testing.assert_close(z.grad.double(), exact.grad, rtol=rounding, atol=2e-6)
        assert not z.grad[:, V:].any()


def test_cap_and_slope_are_those_of_float64():
    z = torch.linspace(-20, 20, 401)
    exact = z.double().requires_grad_()
    capped(exact).sum().backward()
    found = soft_capped(z, CAP)
    torch.testing.assert_close(found.double(), capped(exact).detach(), rtol=2e-7, atol=1e-7)
    torch.testing.assert_close(cap_slope(found, CAP).double(), exact.grad, rtol=0, atol=2e-7)
    assert torch.autograd.gradcheck(capped, exact.detach()[::40].requires_grad_())
    assert soft_capped(z, None) is z and soft_capped(z, 0.0) is z
    out = soft_capped(torch.tensor([-math.inf, math.inf, math.nan]), CAP)
    assert out[0] == -math.inf and out[1] == CAP and out[2].isnan()
    assert cap_slope(out[:2], CAP).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_a_teacher_in_the_job_is_compared_with_the_capped_logits(divergence):
    g = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(11, 2, 48, generator=g) * 6, torch.randn(2, 11, V, generator=g)
    labels = torch.randint(0, V, (11, 2), generator=g)
    labels[3] = -100

    def run(z, settings):
        return dense_kd_loss(
            z,
            labels,
            lambda sequence: teacher[sequence],
            divergence=divergence,
            settings=settings,
            vocab_size=V,
            tensor_group=None,
        )

    settings = LossSettings(ce_weight=0.3, kd_weight=0.7, temperature=2.0, z_loss=0.01)
    exact = logits.double().requires_grad_()
    inner = capped(exact).detach().float().requires_grad_()
    expected, expected_terms = run(inner, settings)
    expected.sum().backward()
    capped(exact).backward(inner.grad.double())
    z = logits.clone().requires_grad_()
    losses, terms = run(z, replace(settings, logit_cap=CAP))
    losses.sum().backward()
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(terms, expected_terms, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-5, atol=2e-6)


def batch_of(labels, targets):
    return TokenBatch(
        tokens=labels[None].clamp(min=0),
        labels=labels[None],
        targets=SparseTargets(ids=targets.ids[None], probs=targets.probs[None]),
    )


@pytest.mark.parametrize("by", ["all", "student_entropy"])
def test_both_heads_of_the_objective_cap_and_choose_by_capped_entropies(by):
    _, labels, targets = make_case(4)
    g = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(23, 1, 16, generator=g) * 2, torch.randn(48, 16, generator=g)
    config = ObjectiveConfig(ce_weight=0.3, kd_weight=0.7, positions=by, position_share=0.5)
    found = []
    for chunk_tokens, cap in ((None, CAP), (5, CAP), (None, None)):
        objective = DistillationObjective(
            config, vocab_size=V, tensor_group=None, chunk_tokens=chunk_tokens, logit_cap=cap
        )
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logits = h @ w.t()
        if cap is None:
            logits = capped(logits)
        if objective.takes_hidden:
            sums = objective.from_hidden(h, w, batch=batch_of(labels, targets))
        else:
            sums = objective(logits * 1.0, batch_of(labels, targets))
        sums[0].backward()
        found.append((sums.detach(), h.grad, w.grad))
    for some in found[:2]:
        for one, other in zip(some, found[2], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def test_entropies_are_of_the_capped_logits():
    logits, *_ = make_case(5, scale=6.0)
    logits[1, 2:30] = -math.inf
    wanted = row_entropies(torch.where(logits.isinf(), logits, capped(logits))[:, :V], None)
    torch.testing.assert_close(row_entropies(logits[:, :V], None, cap=CAP), wanted)
    assert (row_entropies(logits[:, :V], None) - wanted).abs().max() > 0.5


def test_an_objective_of_a_teacher_takes_the_cap_of_its_student():
    class Teacher:
        vocab_size = V

    objective = TeacherObjective(
        Teacher(), ObjectiveConfig(kd_weight=1.0), vocab_size=V, tensor_group=None, logit_cap=CAP
    )
    assert objective.settings.logit_cap == CAP
    objective.begin_step(7)
    assert objective.settings.logit_cap == CAP


def sliced_losses() -> list[float]:
    """Largest difference of loss and gradient between this rank's columns and the whole, over all ranks."""
    import torch.distributed as dist

    stages.launcher_for = lambda source, device: emulated(source)
    with process_group():
        group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
        worst = torch.zeros(2, dtype=torch.float64)
        for number, settings in enumerate(FORMS.values()):
            # At padded = 96 the last rank owns padding columns only.
            logits, labels, targets = make_case(number, padded=(48, 96)[number % 2])
            whole = logits.clone().requires_grad_()
            expected, _ = loss_of(whole, labels, targets, settings)
            expected.sum().backward()
            for backend in ("reference", "cuda"):
                mine = logits.chunk(size, dim=1)[rank].clone().requires_grad_()
                losses, _ = loss_of(mine, labels, targets, settings, backend, group)
                losses.sum().backward()
                loss_error = (losses - expected).abs().max().detach()
                error = (mine.grad - whole.grad.chunk(size, dim=1)[rank]).abs().max()
                worst = torch.maximum(worst, torch.stack((loss_error, error)).double())
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.tolist()


def test_a_vocabulary_split_over_ranks_gives_the_unsplit_loss_and_gradient():
    loss_error, gradient_error = run_distributed(sliced_losses, 2)
    assert loss_error < 5e-6
    assert gradient_error < 2e-6
