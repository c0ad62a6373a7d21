"""The loss and its gradient against a float64 autograd reference."""

from __future__ import annotations

import pytest
import torch

from distill_pretrain.contracts import SparseTargets
from distill_pretrain.kernels.sparse_kd import launch, stages
from distill_pretrain.kernels.sparse_kd.settings import LossSettings
from distill_pretrain.losses.backend import LossBackend
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.losses.sparse_kd import DistillationObjective, sparse_kd_loss
from distill_pretrain.processes.process import process_group
from tests.losses.cases import make_case
from tests.support.distributed import run_distributed
from tests.support.emulation import emulated


def reference_terms(logits, labels, targets, vocab_size):
    """CE and KL per token by their definitions, from logits float64[T, V_pad] (autograd flows)."""
    log_p = torch.log_softmax(logits[:, :vocab_size], dim=-1)
    has_label = labels >= 0
    ce = -log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0] * has_label
    if targets is None:
        return ce, torch.zeros_like(ce)
    kept = targets.ids >= 0
    t = torch.zeros_like(log_p).scatter_add_(
        1, targets.ids.clamp(min=0), torch.where(kept, targets.probs.double(), 0.0)
    )
    return ce, (torch.special.xlogy(t, t) - t * log_p).sum(-1)


WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)]


@pytest.mark.parametrize("mass", ["full", "truncated"])
@pytest.mark.parametrize(("ce_weight", "kd_weight"), WEIGHTS)
def test_loss_and_gradient_equal_the_float64_reference(ce_weight, kd_weight, mass):
    for seed in range(10):
        logits, labels, targets = make_case(seed, mass=mass)
        exact = logits.double().requires_grad_()
        ce, kl = reference_terms(exact, labels, targets, 37)
        row_weights = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed)) + 0.5
        ((ce_weight * ce + kd_weight * kl) * row_weights).sum().backward()

        z = logits.clone().requires_grad_()
        loss, terms = sparse_kd_loss(
            *(z, labels, targets, LossSettings(ce_weight=ce_weight, kd_weight=kd_weight)),
            vocab_size=37,
            tensor_group=None,
        )
        (loss * row_weights).sum().backward()
        torch.testing.assert_close(terms[0].double(), ce.detach(), rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(terms[1].double(), kl.detach(), rtol=1e-5, atol=2e-6)
        expected = (ce_weight * ce + kd_weight * kl).detach()
        torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_padding_columns_carry_no_mass_and_get_no_gradient():
    logits, labels, targets = make_case(1)
    poisoned = logits.clone()
    poisoned[:, 37:] = 1e4
    results = []
    for z in (logits, poisoned):
        z = z.clone().requires_grad_()
        loss, _ = sparse_kd_loss(
            *(z, labels, targets, LossSettings(ce_weight=0.5, kd_weight=0.5)),
            vocab_size=37,
            tensor_group=None,
        )
        loss.sum().backward()
        assert z.grad[:, 37:].abs().max() == 0
        results.append((loss.detach(), z.grad[:, :37]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_token_without_label_and_targets_contributes_nothing():
    logits, labels, targets = make_case(2)
    labels[0] = -100  # row 0 has no targets either
    z = logits.clone().requires_grad_()
    loss, terms = sparse_kd_loss(
        *(z, labels, targets, LossSettings(ce_weight=0.5, kd_weight=0.5)),
        vocab_size=37,
        tensor_group=None,
    )
    loss.sum().backward()
    assert loss[0] == 0 and terms[:, 0].abs().max() == 0 and z.grad[0].abs().max() == 0


def test_bf16_gradient_is_the_fp32_gradient_rounded_once():
    logits, labels, targets = make_case(3)
    low = logits.bfloat16()
    grads = []
    for z in (low.clone(), low.float()):
        z.requires_grad_()
        loss, _ = sparse_kd_loss(
            *(z, labels, targets, LossSettings(ce_weight=0.3, kd_weight=0.7)),
            vocab_size=37,
            tensor_group=None,
        )
        loss.sum().backward()
        grads.append(z.grad)
    assert torch.equal(grads[0], grads[1].bfloat16())


def test_large_logits_do_not_overflow_and_minus_infinity_gets_no_gradient():
    logits, labels, targets = make_case(4)
    logits += 3e4
    # Where there is no target, the loss reads column 0 for nothing.
    gone = [0, 36]
    logits[:, gone] = float("-inf")
    labels = labels.masked_fill((labels == 0) | (labels == 36), 1)
    ids = targets.ids.masked_fill((targets.ids == 0) | (targets.ids == 36), -1)
    assert (ids < 0).any()
    targets = SparseTargets(ids=ids, probs=targets.probs.masked_fill(ids < 0, 0.0))
    z = logits.clone().requires_grad_()
    loss, _ = sparse_kd_loss(
        *(z, labels, targets, LossSettings(ce_weight=0.5, kd_weight=0.5)),
        vocab_size=37,
        tensor_group=None,
    )
    loss.sum().backward()
    finite = logits.double().clamp(min=-1e9)
    ce, kl = reference_terms(finite, labels, targets, 37)
    torch.testing.assert_close(loss.double(), 0.5 * (ce + kl), rtol=1e-5, atol=1e-4)
    assert torch.isfinite(z.grad).all()
    assert z.grad[:, gone].abs().max() == 0


def test_a_target_of_probability_0_by_the_student_is_infinitely_far():
    logits, labels, targets = make_case(4)
    row, entry = (targets.probs > 0).nonzero()[0].tolist()
    logits[row, targets.ids[row, entry]] = float("-inf")
    _, terms = sparse_kd_loss(
        *(logits, labels, targets, LossSettings(ce_weight=0.0, kd_weight=1.0)),
        vocab_size=37,
        tensor_group=None,
    )
    assert terms[1, row] == float("inf")


def test_a_second_backward_is_refused():
    logits, labels, targets = make_case(5)
    z = logits.clone().requires_grad_()
    loss, _ = sparse_kd_loss(
        *(z, labels, targets, LossSettings(ce_weight=1.0, kd_weight=1.0)),
        vocab_size=37,
        tensor_group=None,
    )
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_objective_sums_over_tokens():
    from distill_pretrain.contracts import TokenBatch

    logits, labels, targets = make_case(6)
    config = ObjectiveConfig(ce_weight=0.3, kd_weight=0.7)
    objective = DistillationObjective(config, vocab_size=37, tensor_group=None)
    # The model's logits are [L, B, V], a batch is [B, L]; here B = 1.
    batch = TokenBatch(
        tokens=labels[None],
        labels=labels[None],
        targets=SparseTargets(ids=targets.ids[None], probs=targets.probs[None]),
    )
    sums = objective(logits[:, None], batch)
    ce, kl = reference_terms(logits.double(), labels, targets, 37)
    expected = torch.stack((0.3 * ce.sum() + 0.7 * kl.sum(), ce.sum(), kl.sum()))
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)


def sliced_losses() -> dict[str, float]:
    """Largest difference between this rank's slice of the columns and the whole, over all ranks."""
    import torch.distributed as dist

    launcher = emulated(launch.SOURCE)
    stages.launcher_for = lambda source, device: launcher
    with process_group():
        group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
        worst = torch.zeros(2, dtype=torch.float64)
        # At padded = 96 the last rank owns padding columns only.
        for seed, padded in ((0, 48), (1, 48), (2, 96)):
            logits, labels, targets = make_case(seed, padded=padded, mass="truncated")
            settings = LossSettings(ce_weight=0.3, kd_weight=0.7)
            whole = logits.clone().requires_grad_()
            expected, _ = sparse_kd_loss(
                whole, labels, targets, settings, vocab_size=37, tensor_group=None
            )
            expected.sum().backward()
            for name in ("reference", "cuda"):
                mine = logits.chunk(size, dim=1)[rank].clone().requires_grad_()
                loss, _ = sparse_kd_loss(
                    *(mine, labels, targets, settings),
                    vocab_size=37,
                    tensor_group=group,
                    implementation=LossBackend(name=name),
                )
                loss.sum().backward()
                loss_error = (loss - expected).abs().max().detach().double()
                grad_error = (mine.grad - whole.grad.chunk(size, dim=1)[rank]).abs().max().double()
                worst = torch.maximum(worst, torch.stack((loss_error, grad_error)))
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return {"loss": worst[0].item(), "gradient": worst[1].item()}


@pytest.mark.parametrize("num_processes", [2, 4])
def test_a_vocabulary_split_over_ranks_gives_the_unsplit_loss_and_gradient(num_processes):
    worst = run_distributed(sliced_losses, num_processes)
    assert worst["loss"] < 5e-6
    assert worst["gradient"] < 1e-6
