"""Where the teacher is learnt from: against float64 autograd of the definition, position by position."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from distill_pretrain.contracts import SparseTargets, TokenBatch
from distill_pretrain.kernels.sparse_kd import launch, stages
from distill_pretrain.losses.backend import LossBackend
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.losses.dense_kd import TeacherObjective
from distill_pretrain.losses.positions import row_entropies
from distill_pretrain.losses.sparse_kd import DistillationObjective
from distill_pretrain.processes.process import process_group
from tests.losses.cases import make_case
from tests.support.distributed import run_distributed
from tests.support.emulation import emulated

V, PADDED, L, B = 37, 48, 8, 3
RULES = {
    "student": {"positions": "student_entropy", "position_share": 0.3},
    "all of them": {"positions": "student_entropy", "position_share": 1.0},
    "teacher": {"positions": "teacher_entropy", "entropy_threshold": 1.2},
}


def config(rule, **settings):
    return ObjectiveConfig(ce_weight=0.3, kd_weight=0.7, **RULES[rule], **settings)


def case(seed=0):
    """Logits [L, B, PADDED] and a batch [B, L]."""
    logits, labels, targets = make_case(seed, num_tokens=L * B, scale=3.0, mass="truncated")
    # As the corpora have it: no label, no target.
    none = (labels < 0).unsqueeze(-1)
    ids, probs = targets.ids.masked_fill(none, -1), targets.probs.masked_fill(none, 0.0)

    def batch_first(x):
        return x.view(L, B, *x.shape[1:]).transpose(0, 1).contiguous()

    batch = TokenBatch(
        tokens=batch_first(labels).clamp(min=0),
        labels=batch_first(labels),
        targets=SparseTargets(ids=batch_first(ids), probs=batch_first(probs)),
        weights=torch.rand(B, L, generator=torch.Generator().manual_seed(seed)) + 0.5,
    )
    return logits.view(L, B, PADDED), batch


def entropy(p):
    return -(p * p.log()).sum().item()


def chosen_places(settings, entropies, candidates):
    """The set of (sequence, position), from entropies by (sequence, position)."""
    if settings.positions == "teacher_entropy":
        return {at for at in candidates if entropies[at] > settings.entropy_threshold}
    found = set()
    for sequence in range(B):
        mine = [at for at in candidates if at[0] == sequence]
        mine.sort(key=lambda at: -entropies[at])
        found |= set(mine[: math.ceil(settings.position_share * len(mine))])
    return found


def expected(logits, batch, settings, teacher=None):
    """Sums of loss, CE and KL, gradient by the logits, and what is chosen; a teacher's logits are float64[B, L, V]."""
    z = logits.double().requires_grad_()
    targets, entropies, candidates = {}, {}, []
    for b in range(B):
        for i in range(L):
            if batch.labels[b, i] < 0:
                continue
            if teacher is None:
                ids, t = batch.targets.ids[b, i], batch.targets.probs[b, i].double()
                ids, t = ids[ids >= 0], t[ids >= 0]
                rest = 1 - t.sum()
                of_teacher = entropy(torch.cat((t, rest[None]))) if len(ids) else 0.0
            else:
                ids, t = torch.arange(V), teacher[b, i].softmax(0)
                of_teacher = entropy(t)
            if len(ids):
                candidates.append((b, i))
            by_student = settings.positions == "student_entropy"
            of_student = entropy(z[i, b, :V].detach().softmax(0))
            entropies[b, i] = of_student if by_student else of_teacher
            targets[b, i] = ids, t
    chosen = chosen_places(settings, entropies, candidates)
    sums = torch.zeros(3, dtype=torch.float64)
    for (b, i), (ids, t) in targets.items():
        log_p = z[i, b, :V].log_softmax(0)
        ce = -log_p[batch.labels[b, i]]
        is_chosen = (b, i) in chosen
        kl = (t * (t.log() - log_p[ids])).sum() if is_chosen else torch.zeros(()).double()
        loss = 0.3 * ce + 0.7 * (kl if is_chosen else ce)
        sums = sums + batch.weights[b, i] * torch.stack((loss, ce, kl))
    sums[0].backward()
    return sums.detach(), z.grad, chosen


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    launcher = emulated(launch.SOURCE)
    monkeypatch.setattr(stages, "launcher_for", lambda source, device: launcher)


def objective_of(settings, backend, *, tensor_group=None, chunk_tokens=None):
    found = DistillationObjective(
        settings, vocab_size=V, tensor_group=tensor_group, chunk_tokens=chunk_tokens
    )
    found.backend = LossBackend(name=backend)
    return found


@pytest.mark.parametrize("backend", ["reference", "cuda"])
@pytest.mark.parametrize("rule", RULES)
def test_the_chosen_learn_from_the_target_and_the_others_from_their_label(rule, backend):
    settings = config(rule)
    for seed in range(3):
        logits, batch = case(seed)
        wanted, gradient, chosen = expected(logits, batch, settings)
        assert chosen
        z = logits.clone().requires_grad_()
        sums = objective_of(settings, backend)(z * 1.0, batch)
        sums[0].backward()
        torch.testing.assert_close(sums.detach().double(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(z.grad.double(), gradient, rtol=1e-5, atol=2e-6)


def test_an_evaluation_compares_all_positions():
    logits, batch = case()
    some, every = (
        objective_of(settings, "reference")
        for settings in (config("student"), ObjectiveConfig(ce_weight=0.3, kd_weight=0.7))
    )
    with torch.no_grad():
        assert torch.equal(some(logits, batch), every(logits, batch))
    assert some(logits, batch)[2] < every(logits, batch)[2]


def test_without_any_target_all_learn_their_label():
    logits, batch = case()
    empty = SparseTargets(ids=batch.targets.ids[..., :0], probs=batch.targets.probs[..., :0])
    sums = objective_of(config("student"), "reference")(logits, replace(batch, targets=empty))
    torch.testing.assert_close(sums, torch.stack((sums[1], sums[1], torch.tensor(0.0))))


@pytest.mark.parametrize("backend", ["reference", "cuda"])
@pytest.mark.parametrize("rule", RULES)
def test_the_chunked_head_chooses_from_whole_sequences(rule, backend):
    settings = config(rule)
    _, batch = case(1)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(L, B, 6, generator=g), torch.randn(PADDED, 6, generator=g)
    results = []
    for chunk_tokens in (None, 7):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        objective = objective_of(settings, backend, chunk_tokens=chunk_tokens)
        if chunk_tokens is None:
            sums = objective(h @ w.t(), batch)
        else:
            sums = objective.from_hidden(h, w, batch=batch)
        sums[0].backward()
        results.append((sums.detach(), h.grad, w.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_teacher_in_the_job_is_learnt_from_where_it_is_chosen(rule):
    logits, batch = case(2)
    settings = config(rule, target="teacher")
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(5)) * 3

    class Table:
        vocab_size = V
        device = torch.device("cpu")

        def logits(self, tokens):
            return table[tokens]

    wanted, gradient, chosen = expected(logits, batch, settings, table[batch.tokens].double())
    assert chosen and (rule == "all of them" or len(chosen) < (batch.labels >= 0).sum())
    z = logits.clone().requires_grad_()
    objective = TeacherObjective(Table(), settings, vocab_size=V, tensor_group=None)
    sums = objective(z, batch)
    sums[0].backward()
    torch.testing.assert_close(sums.detach().double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z.grad.double(), gradient, rtol=1e-5, atol=2e-6)


def sliced() -> list[float]:
    """Largest differences between this rank's slice of the columns and the whole, over all ranks."""
    import torch.distributed as dist

    with process_group():
        group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
        worst = torch.zeros(2, dtype=torch.float64)
        logits, batch = case(3)
        for rule in RULES:
            whole = logits.clone().requires_grad_()
            wanted = objective_of(config(rule), "reference")(whole * 1.0, batch)
            wanted[0].backward()
            mine = logits.chunk(size, dim=-1)[rank].clone().requires_grad_()
            sums = objective_of(config(rule), "reference", tensor_group=group)(mine * 1.0, batch)
            sums[0].backward()
            gaps = (sums - wanted, mine.grad - whole.grad.chunk(size, dim=-1)[rank])
            found = torch.stack([gap.detach().abs().max().double() for gap in gaps])
            worst = torch.maximum(worst, found)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.tolist()


def test_a_vocabulary_split_over_ranks_chooses_the_same():
    sums, gradient = run_distributed(sliced, 2)
    assert sums < 2e-5 and gradient < 2e-6


def test_entropies_are_exact_at_any_scale(monkeypatch):
    monkeypatch.setattr("distill_pretrain.losses.positions.CHUNK_ELEMENTS", 100)
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(40, V, generator=g) * torch.logspace(-2, 3, 40).unsqueeze(-1)
    logits[3, 5] = -math.inf
    log_p = logits.double().log_softmax(-1)
    wanted = -torch.where(log_p > -math.inf, log_p.exp() * log_p, 0.0).sum(-1)
    torch.testing.assert_close(row_entropies(logits, None).double(), wanted, rtol=1e-5, atol=1e-5)
