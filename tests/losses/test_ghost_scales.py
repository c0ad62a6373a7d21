"""The ghost bucket at logits of every scale: value and gradient against float64 autograd of the dense definition."""

from __future__ import annotations

import functools

import pytest
import torch

from distill_pretrain.contracts import SparseTargets
from distill_pretrain.kernels.chunked_head.op import chunked_head
from distill_pretrain.kernels.sparse_kd import launch, reference, stages
from distill_pretrain.kernels.sparse_kd.settings import LossSettings
from distill_pretrain.losses.backend import LossBackend
from distill_pretrain.losses.sparse_kd import prepare_loss, sparse_kd_loss
from distill_pretrain.processes.process import process_group
from tests.support.distributed import run_distributed
from tests.support.emulation import emulated

V, PADDED = 37, 48
SCALES = (1.0, 30.0, 100.0, 1e3, 3e3, 1e4)
SETTINGS = ((1.0, 0.0), (2.5, 0.2), (0.6, 0.0))
"""Temperature, smoothing."""


@functools.cache
def rows(scale):
    """Logits, labels and targets of mass 0.7."""
    g = torch.Generator().manual_seed(int(scale))
    logits = torch.randn(7, PADDED, generator=g) * scale
    real = logits[:, :V]
    kept = (
        real[0].topk(5).indices,
        torch.randperm(V, generator=g)[:5],
        real[2].topk(5, largest=False).indices,
        torch.arange(PADDED // 2),  # nothing is outside on the first of two ranks
        torch.arange(PADDED // 2, V),  # nor on the second
        torch.arange(V),  # nor at all
        torch.arange(0),
    )
    ids = torch.stack([torch.nn.functional.pad(row, (0, V - len(row)), value=-1) for row in kept])
    probs = (torch.rand(7, V, generator=g) + 0.02).masked_fill(ids < 0, 0.0)
    probs *= 0.7 / probs.sum(-1, keepdim=True).clamp(min=1e-9)
    labels = torch.tensor([int(ids[0, 2]), 9, -100, 30, 2, -100, 3])
    return logits, labels, SparseTargets(ids=ids, probs=probs)


@functools.cache
def expected(scale, temperature, smoothing):
    """Loss [T] and gradient [T, PADDED] of CE + 0.7 tau^2 KL, float64."""
    logits, labels, targets = rows(scale)
    z = logits.double().requires_grad_()
    losses = []
    for row, y, ids, probs in zip(z[:, :V], labels, targets.ids, targets.probs, strict=True):
        kept = ids[ids >= 0]
        loss = row.logsumexp(0) - row[y] if y >= 0 else 0.0 * row[0]
        if len(kept):
            stored = probs[ids >= 0].double()
            t = stored ** (1 / temperature)
            t = t * stored.sum() / t.sum()
            missing = 1 - t.sum() if len(kept) < V else 0.0  # of no id there is no bucket
            t = (1 - smoothing) * t + smoothing / V
            bucket = (1 - smoothing) * missing + smoothing * (V - len(kept)) / V
            log_q = (row / temperature).log_softmax(0)
            kl = (t * (t.log() - log_q[kept])).sum()
            if bucket:
                others = torch.ones(V, dtype=torch.bool).index_fill(0, kept, False)
                kl = kl + bucket * (bucket.log() - log_q[others].logsumexp(0))
            loss = loss + 0.7 * temperature**2 * kl
        losses.append(loss)
    losses = torch.stack(losses)
    losses.sum().backward()
    return losses.detach(), z.grad


def settings_of(temperature, smoothing):
    return LossSettings(
        ce_weight=1.0,
        kd_weight=0.7,
        temperature=temperature,
        smoothing=smoothing,
        residual="ghost",
    )


def result(scale, temperature, smoothing, backend, group=None, rank=0, size=1):
    logits, labels, targets = rows(scale)
    z = logits.chunk(size, dim=1)[rank].clone().requires_grad_()
    loss, _ = sparse_kd_loss(
        *(z * 1, labels, targets, settings_of(temperature, smoothing)),
        vocab_size=V,
        tensor_group=group,
        implementation=LossBackend(name=backend),
    )
    loss.sum().backward()
    return loss.detach(), z.grad


def from_hidden(scale, temperature, smoothing, backend):
    """By the chunked head: the hidden states are the logits, and the head is the identity."""
    logits, labels, targets = rows(scale)
    loss = prepare_loss(
        labels,
        targets,
        settings_of(temperature, smoothing),
        vocab_size=V,
        num_columns=PADDED,
        tensor_group=None,
        backend=LossBackend(name=backend),
    )
    hidden = logits.clone().requires_grad_()
    summed, _ = chunked_head(hidden, torch.eye(PADDED, requires_grad=True), loss, chunk_tokens=3)
    summed.backward()
    return summed.detach(), hidden.grad


def error(found, scale, temperature, smoothing, rank=0, size=1):
    """Largest error of the loss, relative, and of a row's gradient, relative to its largest element."""
    loss, gradient = expected(scale, temperature, smoothing)
    if found[0].ndim == 0:
        loss = loss.sum()
    of_loss = (found[0] - loss).abs() / loss.abs().clamp(min=1e-3)
    largest = gradient.abs().amax(-1, keepdim=True).clamp(min=1e-3)
    of_gradient = (found[1] - gradient.chunk(size, dim=1)[rank]).abs() / largest
    worst = max(of_loss.max().item(), of_gradient.max().item())
    return worst if found[1].isfinite().all() else float("inf")


@pytest.fixture
def _emulated(monkeypatch):
    launcher = emulated(launch.SOURCE)
    monkeypatch.setattr(stages, "launcher_for", lambda source, device: launcher)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 3 * PADDED)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("backend", ["reference", "cuda"])
@pytest.mark.usefixtures("_emulated")
def test_the_ghost_bucket_is_exact_at_every_scale(backend, scale):
    for settings in SETTINGS:
        assert error(result(scale, *settings, backend), scale, *settings) < 3e-6
        assert error(from_hidden(scale, *settings, backend), scale, *settings) < 3e-6


def worst_when_split() -> list[float]:
    """By each backend, the largest error on any rank."""
    import torch.distributed as dist

    launcher = emulated(launch.SOURCE)
    stages.launcher_for = lambda source, device: launcher
    found = []
    with process_group():
        group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
        for backend in ("reference", "cuda"):
            errors = [
                error(
                    result(scale, *settings, backend, group, rank, size),
                    *(scale, *settings, rank, size),
                )
                for scale in SCALES[::2]
                for settings in SETTINGS
            ]
            worst = torch.tensor(max(errors))
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
            found.append(worst.item())
    return found


def test_a_split_vocabulary_changes_none_of_it():
    assert max(run_distributed(worst_when_split, 2)) < 3e-6


@pytest.mark.parametrize("backend", ["reference", "cuda"])
@pytest.mark.usefixtures("_emulated")
def test_a_bucket_of_which_the_student_excludes_every_id_is_infinite(backend):
    logits = torch.full((2, PADDED), float("-inf"))
    logits[:, :3] = torch.tensor([1.0, 2.0, 4.0])
    logits.requires_grad_()
    ids = torch.arange(3).expand(2, 3)
    probs = torch.tensor([[0.2, 0.3, 0.2], [0.2, 0.3, 0.5]])  # the second gives the others nothing
    loss, _ = sparse_kd_loss(
        *(logits * 1, torch.tensor([-100, -100]), SparseTargets(ids=ids, probs=probs)),
        settings_of(1.0, 0.0),
        vocab_size=V,
        tensor_group=None,
        implementation=LossBackend(name=backend),
    )
    loss.sum().backward()
    q = torch.tensor([1.0, 2.0, 4.0]).softmax(0)
    assert loss[0] == float("inf")
    torch.testing.assert_close(
        loss[1].detach(), 0.7 * (probs[1] * (probs[1].log() - q.log())).sum()
    )
    torch.testing.assert_close(logits.grad[:, :3], 0.7 * (q - probs))
    assert (logits.grad[:, 3:] == 0).all()
