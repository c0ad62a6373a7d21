"""What the functions of the loss refuse, and what becomes of ids that get past them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from distill_pretrain.contracts import SparseTargets
from distill_pretrain.errors import ConfigError, LossInputError
from distill_pretrain.kernels.chunked_head.op import chunked_head
from distill_pretrain.kernels.sparse_kd import launch, stages
from distill_pretrain.kernels.sparse_kd.op import sparse_kd
from distill_pretrain.kernels.sparse_kd.settings import LossSettings
from distill_pretrain.losses import dense_kd
from distill_pretrain.losses.backend import LossBackend
from distill_pretrain.losses.dense_kd import dense_kd_loss
from distill_pretrain.losses.sparse_kd import prepare_loss, sparse_kd_loss
from distill_pretrain.processes.process import process_group
from tests.losses.cases import make_case
from tests.support.distributed import run_distributed
from tests.support.emulation import emulated

V, PADDED = 37, 48
BEYOND = (V, PADDED - 1, PADDED, 1 << 31, (1 << 32) + 3)
"""The first padding column, the last, what no column has, and what 32 bits cut to another id."""


def loss_of(logits, labels, targets, **settings):
    others = ("vocab_size", "tensor_group", "implementation")
    arguments = {name: settings.pop(name) for name in others if name in settings}
    chosen = LossSettings(**{"ce_weight": 0.3, "kd_weight": 0.7} | settings)
    arguments = {"vocab_size": V, "tensor_group": None} | arguments
    return sparse_kd_loss(logits, labels, targets, chosen, **arguments)


@pytest.fixture(params=["reference", "cuda"])
def loss(request, monkeypatch):
    """The function of the loss by either backend."""
    launcher = emulated(launch.SOURCE)
    monkeypatch.setattr(stages, "launcher_for", lambda source, device: launcher)
    return partial(loss_of, implementation=LossBackend(name=request.param))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"residual": "nonsense"}, "where: residual; found: nonsense; expected: drop,.*uniform"),
        ({"smoothing": 1.5}, "where: smoothing; found: 1.5; expected: at least 0 and less than 1"),
        ({"smoothing": -0.1}, "where: smoothing"),
        ({"temperature": -1.0}, "where: temperature; found: -1.0; expected: more than 0"),
        ({"temperature": 0.0}, "where: temperature"),
        ({"temperature": float("nan")}, "where: temperature"),
        ({"temperature": float("inf")}, "where: temperature"),
        ({"ce_weight": -1.0}, "where: ce_weight"),
        ({"kd_weight": float("nan")}, "where: kd_weight"),
        ({"z_loss": -1.0}, "where: z_loss"),
        ({"token_weighting": "mine"}, "where: token_weighting; .*teacher_confidence"),
        ({"implementation": "triton"}, "found: triton"),
    ],
)
def test_settings_that_are_none_are_refused(loss, settings, words):
    with pytest.raises(ConfigError, match=words):
        loss(*make_case(0), **settings)


@pytest.mark.parametrize("vocab_size", [0, PADDED + 1])
def test_a_vocabulary_that_the_logits_do_not_have_is_refused(loss, vocab_size):
    logits, labels, targets = make_case(0)
    with pytest.raises(LossInputError, match=f"found: {vocab_size}; expected: 1 to {PADDED}"):
        loss(logits, labels, targets, vocab_size=vocab_size)
    with pytest.raises(LossInputError, match=f"found: {vocab_size}; expected: 1 to {PADDED}"):
        dense_loss_of(logits, labels, vocab_size=vocab_size)


@pytest.mark.parametrize("beyond", BEYOND)
def test_a_label_outside_the_vocabulary_is_refused(loss, beyond):
    logits, labels, targets = make_case(0)
    labels[4] = beyond
    for function in (loss, lambda z, y, _: dense_loss_of(z, y)):
        with pytest.raises(LossInputError, match=f"where: labels; found: {beyond}; .*below {V}"):
            function(logits, labels, targets)


@pytest.mark.parametrize("beyond", [*BEYOND, -2, -100])
def test_a_target_outside_the_vocabulary_is_refused(loss, beyond):
    logits, labels, targets = make_case(0)
    targets.ids[4, 2] = beyond
    with pytest.raises(
        LossInputError, match=f"where: targets.ids; found: {beyond}; .*0 to {V - 1}"
    ):
        loss(logits, labels, targets)


@pytest.mark.parametrize("order", ["side by side", "apart"])
def test_an_id_that_is_twice_in_a_row_is_refused(loss, order):
    logits, labels, _ = make_case(0)
    ids = torch.tensor([5, 8, 8, 30] if order == "side by side" else [8, 5, 30, 8])
    ids = torch.stack([torch.arange(4)] * 22 + [ids])
    targets = SparseTargets(ids=ids, probs=torch.full((23, 4), 0.25))
    with pytest.raises(LossInputError, match="row 22; found: id 8 twice; expected: distinct"):
        loss(logits, labels, targets)
    # Any order of distinct ids is as good as another, and padding may be anywhere.
    good = SparseTargets(ids=torch.tensor([[-1, 9, -1, 2]]).expand(23, 4), probs=targets.probs * 0)
    loss(logits, labels, good)


@pytest.mark.parametrize("prob", [-0.1, float("nan"), float("inf")])
def test_probabilities_that_are_none_are_refused(loss, prob):
    logits, labels, targets = make_case(0)
    targets.probs[1, 1] = prob
    with pytest.raises(LossInputError, match=r"where: targets\.probs"):
        loss(logits, labels, targets)
    at_padding = SparseTargets(ids=torch.full((23, 1), -1), probs=torch.full((23, 1), 0.5))
    with pytest.raises(LossInputError, match="beside the padding"):
        loss(logits, labels, at_padding)


def test_what_a_cache_of_log_probabilities_rounds_is_no_mistake(loss):
    logits, labels, _ = make_case(0)
    # Cached are multiples of 1/2048 of -ln p: of these 16 equal ones each is rounded up, by nearly the most there is.
    coded = torch.exp(-torch.round(torch.tensor(16.0).log() * 2048) / 2048 + 2**-12)
    ids = torch.arange(16).expand(23, 16)
    loss(logits, labels, SparseTargets(ids=ids, probs=coded.expand(23, 16)))
    with pytest.raises(LossInputError, match=r"sum to more than 1; .*row 0; found: 1\.001"):
        loss(logits, labels, SparseTargets(ids=ids, probs=torch.full((23, 16), 1.001 / 16)))


def test_shapes_that_do_not_fit_are_refused(loss):
    logits, labels, targets = make_case(0)
    with pytest.raises(LossInputError, match="labels do not fit the logits"):
        loss(logits, labels[:-1], targets)
    with pytest.raises(LossInputError, match="targets do not fit the labels"):
        loss(logits, labels, SparseTargets(ids=targets.ids[1:], probs=targets.probs[1:]))
    with pytest.raises(LossInputError, match="targets do not fit the labels"):
        loss(logits, labels, SparseTargets(ids=targets.ids, probs=targets.probs[:, 1:]))


def test_any_negative_label_is_none(loss):
    logits, labels, targets = make_case(0)
    expected = loss(logits, labels, targets)[0]
    assert torch.equal(loss(logits, labels.where(labels >= 0, -1), targets)[0], expected)


def dense_loss_of(logits, labels, *, vocab_size=V, teacher=None, divergence="forward_kl"):
    rows = torch.zeros(len(logits), V) if teacher is None else teacher
    return dense_kd_loss(
        logits[:, None],
        labels[:, None],
        lambda sequence: rows,
        divergence=divergence,
        settings=LossSettings(ce_weight=0.3, kd_weight=0.7),
        vocab_size=vocab_size,
        tensor_group=None,
    )


def test_a_teacher_that_does_not_fit_and_a_divergence_that_is_none_are_refused():
    logits, labels, _ = make_case(0)
    for shape in ((23, V - 1), (22, V), (V,)):
        with pytest.raises(LossInputError, match="teacher's logits do not fit"):
            dense_loss_of(logits, labels, teacher=torch.zeros(shape))
    with pytest.raises(ConfigError, match="where: divergence; found: chi2"):
        dense_loss_of(logits, labels, divergence="chi2")


def unchecked(labels, targets, backend, group=None):
    """The loss as the trainer makes it: nothing looks at the ids."""
    return prepare_loss(
        labels,
        targets,
        LossSettings(ce_weight=0.3, kd_weight=0.7, residual="ghost"),
        vocab_size=V,
        num_columns=PADDED,
        tensor_group=group,
        backend=LossBackend(name=backend),
    )


def rows_that_are_not_numbers(backend, group=None, rank=0, size=1):
    """bool[2, 3, 23]: of a loss with labels beyond the vocabulary, and with such targets: loss, CE and KL."""
    found = []
    for what in ("labels", "ids"):
        logits, labels, targets = make_case(0)
        for row, beyond in enumerate(BEYOND, 10):
            (labels if what == "labels" else targets.ids[:, 2])[row] = beyond
            targets.probs[row, 2] = 0.05
        mine = logits.chunk(size, dim=1)[rank].clone().requires_grad_()
        loss, terms = sparse_kd(mine * 1, unchecked(labels, targets, backend, group))
        loss.sum().backward()
        found.append(torch.stack((loss.detach(), terms[0], terms[1])).isnan())
    return torch.stack(found)


def expected_rows():
    expected = torch.zeros(2, 3, 23, dtype=torch.bool)
    rows = slice(10, 10 + len(BEYOND))
    expected[:, 0, rows] = True
    expected[0, 1, rows] = expected[1, 2, rows] = True
    return expected


@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_ids_that_get_past_the_checks_are_nan_by_either_backend(backend, monkeypatch):
    launcher = emulated(launch.SOURCE)
    monkeypatch.setattr(stages, "launcher_for", lambda source, device: launcher)
    assert torch.equal(rows_that_are_not_numbers(backend), expected_rows())


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_the_chunked_head_makes_such_labels_nan_too(backend, fits, monkeypatch):
    launcher = emulated(launch.SOURCE)
    monkeypatch.setattr(stages, "launcher_for", lambda source, device: launcher)
    monkeypatch.setattr(launch, "fits_fused", lambda problem, blocks: fits)
    _, labels, targets = make_case(0)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 16, generator=g).requires_grad_()
    weight = torch.randn(PADDED, 16, generator=g).requires_grad_()
    for beyond in BEYOND:
        labels[5] = beyond
        loss = unchecked(labels, targets, backend)
        summed, terms = chunked_head(hidden, weight, loss, chunk_tokens=6)
        assert summed.isnan()
        assert terms[0].isnan().nonzero().flatten().tolist() == [5]
    fine = replace(loss, labels=labels.masked_fill(labels >= V, -100))
    assert chunked_head(hidden, weight, fine, chunk_tokens=6)[0].isfinite()


def test_a_teacher_in_the_job_makes_such_labels_nan_too():
    logits, labels, _ = make_case(0)
    labels[5] = PADDED - 1
    settings = LossSettings(ce_weight=0.3, kd_weight=0.7)
    loss, _ = dense_kd._dense_kd_loss(
        *(logits[:, None], labels[:, None], lambda _: torch.zeros(23, V), "forward_kl"),
        *(settings, V, None),
    )
    assert loss.flatten().isnan().nonzero().flatten().tolist() == [5]


def split_rows() -> list[bool]:
    """Whether this rank finds NaN where all columns on one rank give it, by either backend and in the dense loss."""
    import torch.distributed as dist

    launcher = emulated(launch.SOURCE)
    stages.launcher_for = lambda source, device: launcher
    with process_group():
        group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
        found = [
            torch.equal(rows_that_are_not_numbers(backend, group, rank, size), expected_rows())
            for backend in ("reference", "cuda")
        ]
        logits, labels, targets = make_case(0)
        labels[5] = V + 3
        mine = logits.chunk(size, dim=1)[rank]
        loss, _ = dense_kd._dense_kd_loss(
            *(mine[:, None], labels[:, None], lambda _: torch.zeros(23, V), "forward_kl"),
            *(LossSettings(ce_weight=0.3, kd_weight=0.7), V, group),
        )
        found.append(loss.flatten().isnan().nonzero().flatten().tolist() == [5])
        # A rank's columns are fewer than the vocabulary; all of them together are not.
        for label, refused in ((V - 1, False), (V, True)):
            labels[5] = label
            try:
                loss_of(mine, labels, targets, tensor_group=group)
                found.append(not refused)
            except LossInputError:
                found.append(refused)
    return found


def test_a_split_vocabulary_changes_none_of_it():
    assert run_distributed(split_rows, 2) == [True] * 5
