"""Losses over kept ids and one bucket of all others, against float64 autograd of their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distill_pretrain.contracts import SparseTargets
from distill_pretrain.errors import ConfigError
from distill_pretrain.kernels.chunked_head.op import chunked_head
from distill_pretrain.kernels.sparse_kd import launch, stages
from distill_pretrain.kernels.sparse_kd.settings import LossSettings
from distill_pretrain.losses.backend import LossBackend
from distill_pretrain.losses.sparse_kd import prepare_loss, sparse_kd_loss
from distill_pretrain.processes.process import process_group
from tests.losses.cases import make_case
from tests.support.distributed import run_distributed
from tests.support.emulation import emulated

V = 37
BASE = LossSettings(ce_weight=0.3, kd_weight=0.7, z_loss=0.01)
FORMS = {
    "decoupled": replace(BASE, residual="decoupled"),
    "tempered": replace(BASE, residual="decoupled", temperature=2.5, tail_weight=0.4),
    "tempered, plain": replace(
        BASE, residual="decoupled", temperature=0.6, temperature_squared=False
    ),
    "weighted": replace(BASE, residual="decoupled", token_weighting="teacher_confidence"),
    "smoothed": replace(BASE, residual="decoupled", temperature=2.0, smoothing=0.2),
    "reverse": replace(BASE, residual="ghost", divergence="reverse_kl"),
    "reverse, smoothed": replace(BASE, residual="ghost", divergence="reverse_kl", smoothing=0.2),
    "jensen_shannon": replace(BASE, residual="ghost", divergence="jensen_shannon"),
}
BACKENDS = ("reference", "cuda")


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    launcher = emulated(launch.SOURCE)
    monkeypatch.setattr(stages, "launcher_for", lambda source, device: launcher)


def definition(row, label, kept, stored, settings):
    """Loss and divergence of one row, from logits float64[V] (autograd flows)."""
    tau, a = settings.temperature, settings.smoothing
    loss = row.sum() * 0
    if label >= 0:
        lse = row.logsumexp(0)
        loss = settings.ce_weight * (lse - row[label]) + settings.z_loss * lse**2
    if not len(kept):
        return loss, torch.zeros_like(loss)
    others = torch.ones(V, dtype=torch.bool).index_fill(0, kept, False)
    rest = 1 - stored.sum()
    t = (1 - a) * stored + a / V
    rest = (1 - a) * rest + a * int(others.sum()) / V
    p = row.softmax(0)
    inside, outside = p[kept].sum(), p[others].sum()
    w = settings.kd_weight
    if settings.token_weighting == "teacher_confidence":
        w = w * stored.max()
    if settings.residual == "decoupled":
        mass = t.sum()
        binary = mass * (mass / inside).log() + rest * (rest / outside).log()
        mine, theirs = (row[kept] / tau).softmax(0), (t.log() / tau).softmax(0)
        among = mass * (theirs * (theirs / mine).log()).sum()
        squared = tau**2 if settings.temperature_squared else 1
        value = settings.tail_weight * binary + among
        return loss + w * (settings.tail_weight * binary + squared * among), value
    q, t = torch.cat((p[kept], outside[None])), torch.cat((t, rest[None]))
    if settings.divergence == "reverse_kl":
        value = (q * (q / t).log()).sum()
    else:
        m = (q + t) / 2
        value = ((q * (q / m).log()).sum() + (t * (t / m).log()).sum()) / 2
    return loss + w * value, value


def expected(case, settings, weights):
    """Loss [T], divergence [T] and gradient [T, V_pad] of the weighted sum, float64."""
    logits, labels, targets = case
    z = logits.double().requires_grad_()
    found = [
        definition(row[:V], int(label), ids[ids >= 0], probs[ids >= 0].double(), settings)
        for row, label, ids, probs in zip(z, labels, targets.ids, targets.probs, strict=True)
    ]
    losses, values = (torch.stack(column) for column in zip(*found, strict=True))
    (losses * weights).sum().backward()
    return losses.detach(), values.detach(), z.grad


def cases():
    """Truncated targets of every awkward row, moderate and with logits far apart."""
    for seed, scale in ((0, 2.0), (1, 4.0), (2, 12.0)):
        yield make_case(seed, mass="truncated", scale=scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradient_equal_the_float64_definition(form, backend):
    settings = FORMS[form]
    for number, case in enumerate(cases()):
        logits, labels, targets = case
        weights = torch.rand(len(labels), generator=torch.Generator().manual_seed(number)) + 0.5
        losses, values, gradient = expected(case, settings, weights)
        z = logits.clone().requires_grad_()
        loss, terms = sparse_kd_loss(
            *(z, labels, targets, settings),
            vocab_size=V,
            tensor_group=None,
            implementation=LossBackend(name=backend),
        )
        (loss * weights).sum().backward()
        torch.testing.assert_close(terms[1].double(), values, rtol=2e-5, atol=3e-6)
        torch.testing.assert_close(loss.detach().double(), losses, rtol=2e-5, atol=3e-6)
        torch.testing.assert_close(z.grad.double(), gradient, rtol=2e-5, atol=3e-6)
        assert z.grad[:, V:].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoupled_at_temperature_1_is_ghost(backend):
    logits, labels, targets = make_case(3, mass="truncated")
    found = []
    for residual in ("decoupled", "ghost"):
        z = logits.clone().requires_grad_()
        loss, terms = sparse_kd_loss(
            *(z, labels, targets, replace(BASE, residual=residual)),
            vocab_size=V,
            tensor_group=None,
            implementation=LossBackend(name=backend),
        )
        loss.sum().backward()
        found.append((loss.detach(), terms, z.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_that_is_sure_and_a_target_without_rest_stay_finite(backend):
    logits = torch.zeros(2, 48)
    logits[:, 3] = 60.0
    ids = torch.tensor([[3, 5], [3, 5]])
    for probs in ([[0.75, 0.25], [0.75, 0.25]], [[0.7, 0.1], [0.7, 0.1]]):
        targets = SparseTargets(ids=ids, probs=torch.tensor(probs))
        for form in ("tempered", "reverse", "jensen_shannon"):
            z = logits.clone().requires_grad_()
            loss, _ = sparse_kd_loss(
                *(z, torch.tensor([3, -100]), targets, FORMS[form]),
                vocab_size=V,
                tensor_group=None,
                implementation=LossBackend(name=backend),
            )
            loss.sum().backward()
            assert torch.isfinite(loss).all() and torch.isfinite(z.grad).all(), form


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["tempered", "reverse", "jensen_shannon"])
@pytest.mark.parametrize("is_weighted", [True, False])
def test_the_chunked_head_gives_the_same_loss_and_gradients(is_weighted, form, backend):
    settings = FORMS[form]
    _, labels, targets = make_case(4, mass="truncated")
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(len(labels), 8, generator=g), torch.randn(48, 8, generator=g)
    row_weights = torch.rand(len(labels), generator=g) if is_weighted else None
    results = []
    for chunked in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = prepare_loss(
            *(labels, targets, settings),
            vocab_size=V,
            num_columns=48,
            tensor_group=None,
            backend=LossBackend(name=backend),
        )
        if chunked:
            summed, terms = chunked_head(h, w, loss, chunk_tokens=7, row_weights=row_weights)
        else:
            losses, terms = stages_op(h @ w.t(), loss)
            summed = losses.sum() if row_weights is None else (losses * row_weights).sum()
        summed.backward()
        results.append((summed.detach(), terms, h.grad, w.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-5)


def stages_op(logits, loss):
    from distill_pretrain.kernels.sparse_kd.op import sparse_kd

    return sparse_kd(logits, loss)


def sliced() -> list[float]:
    """Largest differences of loss and gradient between slices of the columns and the whole, over all ranks."""
    import torch.distributed as dist

    launcher = emulated(launch.SOURCE)
    stages.launcher_for = lambda source, device: launcher
    with process_group():
        group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
        worst = torch.zeros(2, dtype=torch.float64)
        # At padded = 96 the last rank owns padding columns only.
        for seed, padded in ((0, 48), (2, 96)):
            logits, labels, targets = make_case(seed, padded=padded, mass="truncated")
            for settings in FORMS.values():
                whole = logits.clone().requires_grad_()
                wanted, _ = sparse_kd_loss(
                    whole, labels, targets, settings, vocab_size=V, tensor_group=None
                )
                wanted.sum().backward()
                for name in BACKENDS:
                    mine = logits.chunk(size, dim=1)[rank].clone().requires_grad_()
                    loss, _ = sparse_kd_loss(
                        *(mine, labels, targets, settings),
                        vocab_size=V,
                        tensor_group=group,
                        implementation=LossBackend(name=name),
                    )
                    loss.sum().backward()
                    every = [torch.empty_like(loss) for _ in range(size)]
                    dist.all_gather(every, loss.detach())
                    assert all(torch.equal(every[0], other) for other in every)
                    gaps = (loss - wanted, mine.grad - whole.grad.chunk(size, dim=1)[rank])
                    found = torch.stack([gap.detach().abs().max().double() for gap in gaps])
                    worst = torch.maximum(worst, found)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.tolist()


@pytest.mark.parametrize("num_processes", [2, 4])
def test_a_vocabulary_split_over_ranks_gives_the_unsplit_loss_and_gradient(num_processes):
    loss, gradient = run_distributed(sliced, num_processes)
    assert loss < 1e-5 and gradient < 3e-6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"divergence": "reverse_kl"}, "ghost with divergence reverse_kl"),
        (
            {"divergence": "jensen_shannon", "residual": "ghost", "temperature": 2.0},
            "1 with divergence",
        ),
        ({"divergence": "total_variation"}, "jensen_shannon"),
        ({"tail_weight": -1.0}, "at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        LossSettings(ce_weight=0.0, kd_weight=1.0, **settings)
