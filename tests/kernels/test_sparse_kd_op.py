"""The loss as torch sees it: schema, compilation, checkpointing, memory, and the branch that drives CUDA kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from distill_pretrain.kernels.sparse_kd import launch, reference, stages
from distill_pretrain.kernels.sparse_kd.op import sparse_kd
from distill_pretrain.kernels.sparse_kd.settings import LossSettings
from distill_pretrain.losses.backend import LossBackend
from distill_pretrain.losses.sparse_kd import prepare_loss
from tests.losses.cases import make_case
from tests.support.emulation import emulated
from tests.support.live_memory import LiveMemory

VOCAB_SIZE, PADDED, HIDDEN = 37, 48, 16
SETTINGS = {
    "plain": {},
    "ghost": {"residual": "ghost", "smoothing": 0.1, "temperature": 2.0},
    "uniform": {"residual": "uniform", "z_loss": 0.01, "token_weighting": "teacher_confidence"},
    "decoupled": {"residual": "decoupled", "tail_weight": 0.5, "temperature": 2.0},
    "reverse_kl": {"residual": "ghost", "divergence": "reverse_kl"},
    "labels alone": {"kd_weight": 0.0},
}


def make_loss(labels, targets, *, vocab_size=VOCAB_SIZE, **settings):
    chosen = LossSettings(**{"ce_weight": 0.3, "kd_weight": 0.7, **settings})
    return prepare_loss(
        labels,
        targets if chosen.kd_weight else None,
        chosen,
        vocab_size=vocab_size,
        tensor_group=None,
        num_columns=PADDED,
        backend=LossBackend(name="reference"),
    )


def case(seed, name="plain"):
    logits, labels, targets = make_case(seed, mass="truncated")
    return logits, make_loss(labels, targets, **SETTINGS[name])


def arguments(logits, loss):
    targets = loss.targets
    parts = (
        [None] * 4
        if targets is None
        else [targets.ids, targets.probs, targets.floor, targets.bucket]
    )
    return (
        *(logits, loss.labels, *parts, loss.kd_scale, loss.vocab_size),
        *(loss.settings.numbers, loss.form, loss.group, loss.backend),
    )


def from_head(loss):
    """A loss of the logits of a small LM head, as a function of its inputs."""

    def summed(hidden, weight):
        losses, terms = sparse_kd(hidden @ weight.t(), loss)
        return losses.sum() + 0.0 * terms.sum()

    return summed


def values_and_gradients(function, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(23, HIDDEN, generator=g).requires_grad_()
    weight = torch.randn(PADDED, HIDDEN, generator=g).requires_grad_()
    value = function(hidden, weight)
    value.backward()
    return value.detach(), hidden.grad, weight.grad


def assert_all_equal(found, expected):
    for some, others in zip(found, expected, strict=True):
        assert torch.equal(some, others)


@pytest.mark.parametrize("name", ["ghost", "labels alone"])
def test_torch_accepts_the_operation(name):
    logits, loss = case(0, name)
    op = torch.ops.distill_pretrain.sparse_kd.default
    opcheck(op, arguments(logits, loss))
    # Compiled, an input that needs a gradient may not be overwritten; an intermediate may, see below.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(op, arguments(logits.clone().requires_grad_(), loss), test_utils=checks)


def test_compiled_whole_and_checkpointed_it_is_the_same():
    summed = from_head(case(1, "ghost")[1])
    expected = values_and_gradients(summed)
    compiled = torch.compile(summed, fullgraph=True, backend="aot_eager")
    assert_all_equal(values_and_gradients(compiled), expected)
    assert_all_equal(
        values_and_gradients(lambda *inputs: checkpoint(summed, *inputs, use_reentrant=False)),
        expected,
    )


def test_a_second_derivative_and_another_reader_of_the_logits_are_refused():
    logits, loss = case(2)
    z = logits.clone().requires_grad_()
    losses, _ = sparse_kd(z * 1, loss)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(losses.sum(), z, create_graph=True)
    product = z * 1
    squares = product.square().sum()
    losses, _ = sparse_kd(product, loss)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (losses.sum() + squares).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_takes_less_than_half_the_logits_beside_them(dtype):
    logits, labels, targets = make_case(3, num_tokens=512, vocab_size=8000, padded=8192, k=12)
    z = logits.to(dtype).requires_grad_()
    loss = make_loss(labels, targets, vocab_size=8000)
    with LiveMemory() as memory:
        product = z.clone()
        before = memory.now
        losses, _ = sparse_kd(product, loss)
        del product
        losses.sum().backward()
    # The gradient that autograd keeps is the logits' memory.
    assert before == z.nbytes
    assert memory.peak < 1.5 * z.nbytes


def emulation(monkeypatch):
    launcher = emulated(launch.SOURCE)
    monkeypatch.setattr(stages, "launcher_for", lambda source, device: launcher)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_cuda_branch_computes_what_the_reference_does(name, monkeypatch):
    emulation(monkeypatch)
    logits, loss = case(4, name)
    g = torch.Generator().manual_seed(0)
    incoming = torch.rand(len(logits), generator=g)
    found = {}
    for implementation in ("reference", "cuda"):
        z = logits.clone().requires_grad_()
        losses, terms = sparse_kd(z * 1, replace(loss, backend=implementation))
        (losses * incoming).sum().backward()
        found[implementation] = (losses.detach(), terms, z.grad)
    for some, others in zip(found["cuda"], found["reference"], strict=True):
        torch.testing.assert_close(some, others, rtol=1e-5, atol=3e-6)
    assert not found["cuda"][2][:, VOCAB_SIZE:].any()


def test_loss_and_gradient_at_once_are_those_of_both_passes(monkeypatch):
    emulation(monkeypatch)
    logits, loss = case(5, "ghost")
    for implementation in ("reference", "cuda"):
        chosen = replace(loss, backend=implementation)
        at_once, in_two = logits.clone(), logits.clone()
        losses, terms = stages.loss_and_gradient_(at_once, chosen)
        seen = stages.forward(in_two, chosen)
        stages.gradient_(in_two, chosen, seen.saved, torch.ones(len(logits)))
        for some, others in ((losses, seen.losses), (terms, seen.terms), (at_once, in_two)):
            torch.testing.assert_close(some, others, rtol=1e-5, atol=3e-6)


def test_the_gradient_is_taken_by_what_the_forward_pass_saved(monkeypatch):
    emulation(monkeypatch)
    logits, loss = case(6, "ghost")
    incoming = torch.ones(len(logits))
    for backend, kind in stages.SAVED.items():
        expected = logits.clone()
        _, _, saved = stages.forward(expected, replace(loss, backend=backend))
        assert type(saved) is kind
        stages.gradient_(expected, replace(loss, backend=backend), saved, incoming)
        # Whatever anybody says between the passes.
        for says in stages.SAVED:
            found = logits.clone()
            stages.gradient_(found, replace(loss, backend=says), saved, incoming)
            assert torch.equal(found, expected)


def test_chunks_change_no_bit(monkeypatch):
    logits, loss = case(7, "ghost")
    whole, chunked = logits.clone(), logits.clone()
    expected = stages.loss_and_gradient_(whole, loss)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 100)
    assert_all_equal((*stages.loss_and_gradient_(chunked, loss), chunked), (*expected, whole))
