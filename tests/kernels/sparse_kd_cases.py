"""Cases for the sparse_kd kernels, and the check of one of them against float64 autograd of the dense definition."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

import torch

from distill_pretrain.contracts import SparseTargets
from distill_pretrain.kernels.cuda.launcher import Launcher
from distill_pretrain.kernels.sparse_kd import launch
from distill_pretrain.kernels.sparse_kd.loss import Loss
from distill_pretrain.kernels.sparse_kd.problem import Problem
from distill_pretrain.kernels.sparse_kd.settings import LossSettings
from distill_pretrain.kernels.sparse_kd.targets import RowTargets, prepare_targets

FORMS = {
    "drop": ("drop", 0.0),
    "renormalise": ("renormalise", 0.0),
    "label": ("label", 0.0),
    "ghost": ("ghost", 0.0),
    "uniform": ("uniform", 0.0),
    "smoothed": ("drop", 0.2),
    "smoothed_ghost": ("ghost", 0.2),
}
TEMPERATURES = (1.0, 2.5, 0.6)

SMALL = launch.Blocks(
    statistics=64, combine=64, gradient=32, gradient_vectors=5, fused=32, max_cluster=8
)
"""Blocks with which small cases have several warps, chunks and blocks of a cluster."""

LAYOUTS = {
    "one rank": 1,
    "two ranks": 2,
    "four ranks": 4,
    "fused, a block": 0,
    "fused, a cluster": 0,
}

HALF_UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
LEAST = {torch.bfloat16: 1e-37, torch.float16: 2**-25, torch.float32: 1e-37}
FP32_ERROR = 8e-6
GAP_VALUE = 77.0
LEVEL = 229 * 4096.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """Logits with the vocabulary's padding, and everything else that `Problem` needs."""

    logits: torch.Tensor
    labels: torch.Tensor
    targets: RowTargets | None
    kd_scale: torch.Tensor | None
    incoming: torch.Tensor
    vocab_size: int
    ce_weight: float = 0.3
    z_loss: float = 0.02
    temperature: float = 1.0
    logit_cap: float = 0.0


def make_case(
    form: str,
    temperature: float,
    dtype: torch.dtype,
    *,
    num_rows: int = 6,
    vocab_size: int = 203,
    padded: int = 208,
    num_entries: int = 13,
    is_wide: bool = True,
    duplicates: bool = False,
    seed: int = 0,
) -> Case:
    """Random rows with every awkward one among them."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, padded, generator=g) * 4
    logits[:, vocab_size:] = 50.0  # padding must not count
    labels = torch.randint(0, vocab_size, (num_rows,), generator=g)
    ids = torch.stack(
        [torch.randperm(vocab_size, generator=g)[:num_entries] for _ in range(num_rows)]
    )
    probs = torch.rand(num_rows, num_entries, generator=g) + 0.02
    drop = torch.rand(num_rows, num_entries, generator=g) < 0.3
    labels[0], labels[1] = -100, -100
    drop[0], drop[1], drop[2] = True, False, True  # neither, targets alone, a label alone
    if num_rows > 3:
        labels[3] = ids[3, 0]
        drop[3, 0] = False
        ids[3, 1:] = ids[3, 1:].sort().values
    ids, probs = ids.masked_fill(drop, -1), probs.masked_fill(drop, 0.0)
    probs = probs / probs.sum(-1, keepdim=True).clamp(min=1e-9) * 0.7
    targets = SparseTargets(ids=ids, probs=probs)
    residual, smoothing = FORMS[form]
    settings = LossSettings(
        ce_weight=0.0,
        kd_weight=1.0,
        temperature=temperature,
        residual=residual,
        smoothing=smoothing,
    )
    prepared = prepare_targets(targets, labels, settings, vocab_size=vocab_size)
    logits[0] = float("nan")  # a row without label and targets takes no part
    if prepared.floor is None:
        logits[1:, 5::17] = float("-inf")
        named = torch.cat((prepared.ids, labels[:, None]), 1).clamp(min=0)
        logits[1:] = logits[1:].scatter(1, named[1:], 1.5)
    if duplicates:
        prepared = with_duplicates(prepared)
    if not is_wide:
        prepared = replace(prepared, ids=prepared.ids.int())
    return Case(
        logits=logits.to(dtype),
        labels=labels,
        targets=prepared,
        kd_scale=(0.4 + torch.rand(num_rows, generator=g)) * temperature**2,
        incoming=torch.rand(num_rows, generator=g) + 0.5,
        vocab_size=vocab_size,
        temperature=temperature,
    )


def with_duplicates(targets: RowTargets) -> RowTargets:
    """Every id twice, with half its probability at each."""
    return replace(
        targets,
        ids=torch.cat((targets.ids, targets.ids), 1),
        probs=torch.cat((targets.probs, targets.probs), 1) / 2,
    )


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Float64: losses [T], terms [3, T], gradient [T, V_pad], and of what size the gradient's summands are."""

    losses: torch.Tensor
    terms: torch.Tensor
    gradient: torch.Tensor
    size: torch.Tensor


def expected_of(case: Case) -> Expected:
    """The dense definition, with autograd."""
    z = case.logits.double().requires_grad_()
    real, size = z[:, : case.vocab_size], torch.zeros(z.shape, dtype=torch.float64)
    slope = torch.ones_like(size)
    if case.logit_cap:
        tangent = torch.tanh(real / case.logit_cap)
        real = torch.where(real == -torch.inf, real, case.logit_cap * tangent)
        # The slope's own error is some units of 2^-24 beside 1, however small it is.
        slope[:, : case.vocab_size] = 1 - tangent.detach() ** 2 + 0.05
    has_label, y = case.labels >= 0, case.labels.clamp(min=0)[:, None]
    lse = torch.logsumexp(real, -1)
    ce = torch.where(has_label, lse - real.gather(1, y)[:, 0], 0.0)
    lse = torch.where(has_label, lse, 0.0)
    at_one = has_label * case.ce_weight + 2 * case.z_loss * lse.abs()
    p = real.softmax(-1)
    size[:, : case.vocab_size] = at_one[:, None] * p
    size.scatter_add_(1, y, (has_label * case.ce_weight)[:, None].double())
    losses = case.ce_weight * ce + case.z_loss * lse.square()
    kl = torch.zeros_like(losses)
    if case.targets is not None:
        kl, kl_size = dense_kl(real, case)
        losses = losses + case.kd_scale.double() * kl
        size[:, : case.vocab_size] += (case.kd_scale.double() / case.temperature)[:, None] * kl_size
    incoming = case.incoming.double()
    rows = has_label if case.targets is None else has_label | (case.targets.ids >= 0).any(1)
    (losses * incoming)[rows].sum().backward()
    gradient = torch.where(rows[:, None], z.grad, 0.0)
    gradient[:, case.vocab_size :] = 0.0
    return Expected(
        losses=torch.where(rows, losses, 0.0).detach(),
        terms=torch.where(rows, torch.stack((ce, kl, lse.square())), 0.0).detach(),
        gradient=gradient,
        size=torch.where(rows[:, None], size * slope * incoming[:, None], 0.0).detach(),
    )


def dense_kl(real: torch.Tensor, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """KL of each row, and the summands' size in its gradient by z / tau."""
    targets, vocab_size = case.targets, case.vocab_size
    is_kept = targets.ids >= 0
    columns = targets.ids.clamp(min=0).long()
    dense = torch.zeros(len(real), vocab_size, dtype=torch.float64)
    dense.scatter_add_(1, columns, torch.where(is_kept, targets.probs.double(), 0.0))
    kept = torch.zeros_like(dense).scatter_add_(1, columns, is_kept.double()) > 0
    if targets.floor is not None:
        dense = dense + targets.floor.double()[:, None]
    log_q = torch.log_softmax(real / case.temperature, -1)
    cross = torch.where(dense > 0, dense * log_q, 0.0)
    kl = (torch.special.xlogy(dense, dense) - cross).sum(-1)
    size = dense + dense.sum(-1, keepdim=True) * log_q.exp()
    if targets.bucket is not None:
        bucket = targets.bucket.double()
        exists = bucket > 0
        removed = kept & exists[:, None]  # of no column the log has no gradient
        outside = torch.logsumexp(log_q.masked_fill(removed, float("-inf")), -1)
        kl = kl + torch.where(exists, torch.special.xlogy(bucket, bucket) - bucket * outside, 0.0)
        inside = (log_q.exp() * kept).sum(-1, keepdim=True)
        of_others = torch.where(exists[:, None], inside * (log_q - outside[:, None]).exp(), 0.0)
        size = size + torch.where(kept, log_q.exp(), of_others) * bucket[:, None]
    return torch.where(is_kept.any(1), kl, 0.0), size


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the kernels give: fp32 losses [T] and terms [3, T], gradient [T, V_pad] of the logits' dtype."""

    losses: torch.Tensor
    terms: torch.Tensor
    gradient: torch.Tensor


def run(
    launcher: Launcher,
    case: Case,
    layout: str,
    *,
    gap: int = 3,
    start: int = 1,
    blocks: launch.Blocks = SMALL,
) -> Result:
    """Loss and gradient in a layout; the logits lie `start` values into a buffer, with `gap` values between rows."""
    num_ranks = LAYOUTS[layout]
    columns = case.logits.size(1) // max(1, num_ranks)
    slices = [in_buffer(part, gap=gap, start=start) for part in case.logits.split(columns, dim=1)]
    problems = [problem_of(case, logits, rank) for rank, (_, logits) in enumerate(slices)]
    if num_ranks == 0:
        if layout == "fused, a block":
            blocks = replace(blocks, fused=512)
        losses, terms = launch.fused_(launcher, problems[0], case.incoming, blocks=blocks)
    else:
        read = [launch.row_statistics(launcher, problem, blocks=blocks) for problem in problems]
        gathered = torch.stack([statistics for statistics, _ in read])
        for problem, (_, picks) in zip(problems, read, strict=True):
            combined = launch.combine(launcher, problem, gathered, blocks=blocks)
            saved = picks, combined.scalars, combined.subtracted
            launch.gradient_(launcher, problem, *saved, case.incoming, blocks=blocks)
        losses, terms = combined.losses, combined.terms
    for buffer, logits in slices:
        result = logits.clone()
        logits.fill_(GAP_VALUE)
        assert (buffer == GAP_VALUE).all(), "wrote between the rows"
        logits.copy_(result)
    gradient = torch.cat([logits for _, logits in slices], 1)
    return Result(losses=losses, terms=terms, gradient=gradient)


def in_buffer(values: torch.Tensor, *, gap: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer full of `GAP_VALUE`, and a copy of `values` in it."""
    rows, columns = values.shape
    buffer = values.new_full((start + rows * (columns + gap),), GAP_VALUE)
    view = buffer.as_strided(values.shape, (columns + gap, 1), start)
    view.copy_(values)
    return buffer, view


def problem_of(case: Case, logits: torch.Tensor, rank: int) -> Problem:
    settings = LossSettings(
        ce_weight=case.ce_weight,
        kd_weight=1.0,
        z_loss=case.z_loss,
        temperature=case.temperature,
        logit_cap=case.logit_cap,
    )
    loss = Loss(
        labels=case.labels,
        targets=case.targets,
        kd_scale=case.kd_scale,
        vocab_size=case.vocab_size,
        settings=settings,
        group=None,
        backend="cuda",
    )
    return Problem(logits=logits, loss=loss, rank=rank)


def check(result: Result, expected: Expected, *, loss_error: float = 1e-5) -> None:
    """Losses to a relative 1e-5; every element of the gradient to fp32's error and one rounding to its dtype."""
    for found, wanted in ((result.losses, expected.losses), (result.terms, expected.terms)):
        torch.testing.assert_close(found.double(), wanted, rtol=loss_error, atol=5e-6)
    dtype = result.gradient.dtype
    allowed = HALF_UNIT[dtype] * expected.gradient.abs() + FP32_ERROR * expected.size + LEAST[dtype]
    error = (result.gradient.double() - expected.gradient).abs()
    worst = (error / allowed).max().item()
    assert worst <= 1.0, f"gradient off by {worst:.3g} times what rounding explains"


@functools.cache
def capped_checks() -> list[tuple[Case, Expected, str, int]]:
    """The few cases that kernels which cap logits in a wrong way must not survive, in bf16."""
    checks = []
    for form, temperature in (("drop", 1.0), ("smoothed_ghost", 2.5)):
        case = replace(make_case(form, temperature, torch.bfloat16, seed=3), logit_cap=4.0)
        checks += [(case, expected_of(case), layout, 0) for layout in LAYOUTS]
    return checks


@functools.cache
def mutation_checks() -> list[tuple[Case, Expected, str, int]]:
    """The few cases (with layout and schedule) that a wrong kernel must not survive, in bf16."""
    checks = []
    forms = (("drop", 1.0), ("ghost", 2.5), ("smoothed", 0.6), ("smoothed_ghost", 1.0))
    for number, (form, temperature) in enumerate(forms):
        case = make_case(
            form,
            temperature,
            torch.bfloat16,
            num_rows=5,
            vocab_size=2603,
            padded=2608,
            num_entries=40,
            duplicates=number % 2 == 0,
            seed=number,
        )
        expected = expected_of(case)
        for layout, schedule in itertools.product(LAYOUTS, (0, 1, 2, 3, 4)):
            if schedule < 3 or layout in ("one rank", "fused, a cluster"):
                checks.append((case, expected, layout, schedule))
    sure = sure_case(torch.bfloat16, 20.0)
    # A likely label that no target names, beside a bucket.
    named = replace(sure_case(torch.bfloat16, 6.0), labels=torch.tensor([9]))
    named.logits[0, 9] = 5.0
    # Others a little below the kept column, and far below.
    near = sure_case(torch.bfloat16, 6.0, temperature=2.5)
    far = far_case(torch.bfloat16, 300.0, temperature=2.5)
    # Whole vectors of padding, and a floor.
    padded = make_case("smoothed", 1.0, torch.bfloat16, padded=272, seed=9)
    level = [level_case(form) for form in ("smoothed", "ghost")]
    for case in (sure, named, near, far, padded, *level):
        checks += [(case, expected_of(case), layout, 0) for layout in LAYOUTS]
    return checks


def far_case(dtype: torch.dtype, scale: float, *, temperature: float = 1.0) -> Case:
    """Logits so far apart that a bucket's columns are nothing beside the kept ones, but for one row where it is so.

    Of the last two rows, one has no column outside on most ranks; the other none but of -inf, and no bucket.
    """
    case = make_case("ghost", temperature, dtype, num_rows=8, num_entries=150, seed=8)
    assert case.targets is not None and case.targets.bucket is not None
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 208, generator=g) * scale
    ids, probs = case.targets.ids.clone(), case.targets.probs.clone()
    for row in (2, 3, 4):
        best = logits[row, :203].topk(40).indices.sort().values
        ids[row] = torch.nn.functional.pad(best, (0, 110), value=-1)
    ids[5] = logits[5, :203].topk(150, largest=False).indices.sort().values
    ids[6:] = torch.arange(150)
    probs[2:] = (torch.rand(6, 150, generator=g) + 0.02).masked_fill(ids[2:] < 0, 0.0)
    probs[2:] *= 0.7 / probs[2:].sum(-1, keepdim=True)
    logits[7, 150:] = float("-inf")
    bucket = torch.where((probs.sum(-1) > 0), 0.3, 0.0)
    bucket[7] = 0.0
    labels = torch.tensor([-100, -100, int(ids[2, 3]), 9, -100, 160, 151, 20])
    return replace(
        case,
        logits=logits.to(dtype),
        labels=labels,
        targets=RowTargets(ids=ids, probs=probs, bucket=bucket),
    )


def level_case(form: str) -> Case:
    """Large logits, nearly all of them equal.

    LEVEL times log2(e), and that over the temperature, are no fp32 numbers: what rounding them leaves out is 2% of an
    exponential, which the loss must not see.
    """
    case = make_case(form, 2.5, torch.bfloat16, seed=10)
    logits = torch.full(case.logits.shape, LEVEL)
    logits[:, ::7] -= 4096.0
    return replace(case, logits=logits.to(torch.bfloat16), z_loss=0.0)


def sure_case(dtype: torch.dtype, height: float, *, temperature: float = 1.0) -> Case:
    """A student that is all but sure of a kept id, with a bucket for the others."""
    logits = torch.zeros(1, 208)
    logits[0, 3] = height
    return Case(
        logits=logits.to(dtype),
        labels=torch.tensor([-100]),
        targets=RowTargets(
            ids=torch.tensor([[3]]), probs=torch.tensor([[0.75]]), bucket=torch.tensor([0.25])
        ),
        kd_scale=torch.tensor([0.5]),
        incoming=torch.ones(1),
        vocab_size=203,
        temperature=temperature,
    )
