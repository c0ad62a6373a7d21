"""Every setting of the sparse loss: value and gradient against float64 autograd of the plain dense definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from distill_pretrain.contracts import SparseTargets
from distill_pretrain.errors import ConfigError
from distill_pretrain.kernels.sparse_kd import reference
from distill_pretrain.kernels.sparse_kd.settings import LossSettings
from distill_pretrain.losses.sparse_kd import sparse_kd_loss
from distill_pretrain.processes.process import process_group
from tests.losses.cases import make_case
from tests.support.distributed import run_distributed

VOCAB_SIZE = 37
RESIDUALS = ("drop", "renormalise", "label", "ghost", "uniform")


def dense_loss(logits, labels, targets, settings):
    """The loss as it is written down, row by row over the whole vocabulary, in float64; also the KLs."""
    tau, a = settings["temperature"], settings["smoothing"]
    losses, kls = [], []
    for z, y, ids, probs in zip(
        logits[:, :VOCAB_SIZE], labels, targets.ids, targets.probs, strict=True
    ):
        y, kept = int(y), ids >= 0
        stored = dict(zip(ids[kept].tolist(), probs[kept].double().tolist(), strict=True))
        loss, kl = z.new_zeros(()), z.new_zeros(())
        lse = torch.logsumexp(z, 0)
        if y >= 0:
            loss = settings["ce_weight"] * (lse - z[y]) + settings["z_loss"] * lse**2
        if stored:
            mass = sum(stored.values())
            powers = {i: p ** (1 / tau) for i, p in stored.items()}
            t = {i: p * mass / sum(powers.values()) for i, p in powers.items()}
            missing = max(0.0, 1 - mass)
            dense = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
            for i, p in t.items():
                dense[i] = p / mass if settings["residual"] == "renormalise" else p
            if settings["residual"] == "label" and y >= 0:
                dense[y] += missing
            if settings["residual"] == "uniform":
                dense += missing / VOCAB_SIZE
            dense = (1 - a) * dense + a / VOCAB_SIZE
            log_q = torch.log_softmax(z / tau, 0)
            outside = [i for i in range(VOCAB_SIZE) if i not in stored]
            if settings["residual"] == "ghost":
                bucket = (1 - a) * missing + a * len(outside) / VOCAB_SIZE
                kl = sum(dense[i] * (dense[i].log() - log_q[i]) for i in stored)
                if outside and bucket > 1e-6:
                    kl = kl + bucket * (math.log(bucket) - torch.logsumexp(log_q[outside], 0))
            else:
                kl = (torch.special.xlogy(dense, dense) - dense * log_q).sum()
            weight = settings["kd_weight"]
            if settings["temperature_squared"]:
                weight *= tau**2
            if settings["token_weighting"] == "teacher_confidence":
                weight *= max(stored.values())
            loss = loss + weight * kl
        losses.append(loss)
        kls.append(kl.detach())
    return torch.stack(losses), torch.stack(kls)


def all_settings():
    """Everything that can change the kind of computation, in all combinations."""
    for residual, temperature, smoothing in itertools.product(RESIDUALS, (1.0, 2.5, 0.6), (0, 0.2)):
        for z_loss, weighting, squared in (
            (0.0, "none", True),
            (0.05, "teacher_confidence", False),
        ):
            yield {
                "residual": residual,
                "temperature": temperature,
                "temperature_squared": squared,
                "smoothing": smoothing,
                "z_loss": z_loss,
                "token_weighting": weighting,
                "ce_weight": 0.3,
                "kd_weight": 0.7,
            }


def name(settings):
    return "-".join(str(value) for value in settings.values())


def run(logits, labels, targets, settings, **more):
    z = logits.clone().requires_grad_()
    arguments = {"vocab_size": VOCAB_SIZE, "tensor_group": None, **more}
    loss, terms = sparse_kd_loss(z, labels, targets, LossSettings(**settings), **arguments)
    weights = torch.linspace(0.5, 1.5, len(labels))
    (loss * weights).sum().backward()
    return loss.detach(), terms, z.grad


@pytest.mark.parametrize("settings", list(all_settings()), ids=name)
def test_every_setting_equals_the_dense_definition(settings, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 5 * 48)  # several chunks
    for seed, mass in ((0, "truncated"), (1, "truncated"), (2, "full")):
        logits, labels, targets = make_case(seed, mass=mass)
        exact = logits.double().requires_grad_()
        expected, kls = dense_loss(exact, labels, targets, settings)
        (expected * torch.linspace(0.5, 1.5, len(labels))).sum().backward()
        loss, terms, grad = run(logits, labels, targets, settings)
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=5e-6)
        torch.testing.assert_close(terms[1].double(), kls, rtol=1e-5, atol=5e-6)
        torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_targets_on_the_whole_vocabulary_give_the_dense_kl(temperature):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 48, generator=g) * 3
    teacher = torch.randn(9, VOCAB_SIZE, generator=g) * 3
    ids = torch.arange(VOCAB_SIZE).expand(9, -1)
    targets = SparseTargets(ids=ids, probs=teacher.softmax(-1))
    log_q = (logits[:, :VOCAB_SIZE] / temperature).double().log_softmax(-1)
    log_t = (teacher / temperature).double().log_softmax(-1)
    expected = (log_t.exp() * (log_t - log_q)).sum(-1)
    for residual in RESIDUALS:
        settings = {"ce_weight": 0.0, "kd_weight": 1.0, "residual": residual}
        _, terms, _ = run(logits, ids[:, 0], targets, settings | {"temperature": temperature})
        torch.testing.assert_close(terms[1].double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_row_without_targets_has_no_divergence(residual):
    logits, labels, targets = make_case(2, mass="truncated")
    labels[0] = -100  # row 0 has no targets either
    settings = {"ce_weight": 0.5, "kd_weight": 0.5, "residual": residual, "smoothing": 0.3}
    for temperature in (1.0, 2.0):
        loss, terms, grad = run(logits, labels, targets, {**settings, "temperature": temperature})
        assert loss[0] == 0 and terms[:, 0].abs().max() == 0 and grad[0].abs().max() == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_ghost_bucket_is_finite_where_the_student_is_sure(temperature):
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 3] = 500.0
    targets = SparseTargets(ids=torch.tensor([[3]]), probs=torch.tensor([[0.75]]))
    settings = {"ce_weight": 0.0, "kd_weight": 1.0, "residual": "ghost", "temperature": temperature}
    loss, _, grad = run(logits, torch.tensor([-100]), targets, settings)
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all()
    # The kept id: (M + R) q - t, here 1 - 0.75 (times tau^2 / tau, and the row's weight 0.5).
    assert grad[0, 3].item() == pytest.approx(0.5 * 0.25 * temperature, rel=1e-5)


def test_the_ghost_bucket_does_not_suffer_from_cancellation():
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 3] = 20.0  # 1 - P_K = 7e-8: below the resolution of fp32 near 1
    targets = SparseTargets(ids=torch.tensor([[3]]), probs=torch.tensor([[0.75]]))
    settings = {"ce_weight": 0.0, "kd_weight": 1.0, "residual": "ghost"}
    _, terms, grad = run(logits, torch.tensor([-100]), targets, settings)
    exact = logits.double().requires_grad_()
    log_q = exact.log_softmax(-1)[0]
    others = torch.logsumexp(torch.cat((log_q[:3], log_q[4:])), 0)
    kl = 0.75 * (math.log(0.75) - log_q[3]) + 0.25 * (math.log(0.25) - others)
    (0.5 * kl).backward()
    assert terms[1].item() == pytest.approx(kl.item(), rel=1e-6)
    torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-5, atol=1e-9)


def test_large_and_infinite_logits_are_stable_at_other_temperatures():
    logits, labels, targets = make_case(4)
    logits += 3e4
    logits[:, 36] = float("-inf")
    labels[labels == 36] = 0
    gone = targets.ids == 36
    targets = SparseTargets(
        ids=targets.ids.masked_fill(gone, -1), probs=targets.probs.masked_fill(gone, 0.0)
    )
    settings = {"ce_weight": 0.5, "kd_weight": 0.5, "residual": "ghost", "temperature": 2.0}
    loss, _, grad = run(logits, labels, targets, settings)
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all()
    assert grad[:, 36].abs().max() == 0


def test_more_entries_than_the_kernel_takes_are_refused_by_number(monkeypatch):
    logits, labels, targets = make_case(0)
    monkeypatch.setattr(reference, "MAX_ENTRIES", 4)
    with pytest.raises(ConfigError, match=r"found: 5; expected: at most 4"):
        run(logits, labels, targets, {"ce_weight": 1.0, "kd_weight": 1.0})


def sliced_settings() -> dict[str, float]:
    """Largest difference between this rank's slice of the columns and the whole, over all ranks and settings."""
    import torch.distributed as dist

    with process_group():
        group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
        worst = torch.zeros(2, dtype=torch.float64)
        for number, settings in enumerate(all_settings()):
            # At padded = 96 the last rank owns padding columns only.
            logits, labels, targets = make_case(
                number, padded=(48, 96)[number % 2], mass="truncated"
            )
            expected, _, whole = run(logits, labels, targets, settings)
            mine = logits.chunk(size, dim=1)[rank]
            loss, _, grad = run(mine, labels, targets, settings, tensor_group=group)
            errors = (loss - expected).abs().max(), (grad - whole.chunk(size, 1)[rank]).abs().max()
            worst = torch.maximum(worst, torch.stack(errors).double())
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return {"loss": worst[0].item(), "gradient": worst[1].item()}


def test_every_setting_gives_the_unsplit_result_on_a_split_vocabulary():
    worst = run_distributed(sliced_settings, 2)
    assert worst["loss"] < 3e-5
    assert worst["gradient"] < 5e-6
