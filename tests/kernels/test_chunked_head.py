"""The chunked LM head: float64 gradients, memory, and what torch and the CUDA kernels make of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from distill_pretrain.kernels.chunked_head import head
from distill_pretrain.kernels.chunked_head.op import chunked_head
from distill_pretrain.kernels.sparse_kd import launch, stages
from distill_pretrain.kernels.sparse_kd.op import sparse_kd
from distill_pretrain.losses.config import ObjectiveConfig
from tests.kernels.test_sparse_kd_op import arguments, make_loss
from tests.losses.cases import make_case
from tests.support.emulation import emulated
from tests.support.live_memory import LiveMemory

TOKENS, COLUMNS, HIDDEN = 23, 48, 16


def case(seed=0, dtype=torch.float32, **settings):
    _, labels, targets = make_case(seed, mass="truncated")
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(COLUMNS, HIDDEN, generator=g).to(dtype).requires_grad_()
    return hidden, weight, make_loss(labels, targets, **settings)


def run(function, hidden, weight, scale=1.0):
    inputs = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    summed, terms = function(*inputs)
    (summed * scale).backward()
    return summed.detach(), terms, *(each.grad for each in inputs)


def full(loss):
    def summed(hidden, weight):
        losses, terms = sparse_kd(hidden @ weight.t(), loss)
        return losses.sum(), terms

    return summed


def chunked(loss, chunk_tokens=6):
    return lambda hidden, weight: chunked_head(hidden, weight, loss, chunk_tokens=chunk_tokens)


SETTINGS = {
    "plain": {},
    "ghost": {"residual": "ghost", "temperature": 2.0, "smoothing": 0.1},
    "z": {"z_loss": 0.01, "token_weighting": "teacher_confidence"},
    "labels alone": {"kd_weight": 0.0},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("chunk_tokens", [1, 6, 100])
def test_chunks_give_the_full_heads_loss_and_gradients(name, chunk_tokens):
    hidden, weight, loss = case(**SETTINGS[name])
    expected = run(full(loss), hidden, weight, scale=3.0)
    found = run(chunked(loss, chunk_tokens), hidden, weight, scale=3.0)
    for some, others in zip(found, expected, strict=True):
        torch.testing.assert_close(some, others, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_float64():
    hidden, weight, loss = case(1)
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    log_p = (exact[0] @ exact[1].t())[:, : loss.vocab_size].log_softmax(-1)
    ids, probs = loss.targets.ids, loss.targets.probs.double()
    kl = -(probs * log_p.gather(1, ids.clamp(min=0))).sum()
    ce = -(log_p.gather(1, loss.labels.clamp(min=0)[:, None])[:, 0] * (loss.labels >= 0)).sum()
    (0.3 * ce + 0.7 * kl).backward()
    *_, grad_hidden, grad_weight = run(chunked(loss), hidden, weight)
    torch.testing.assert_close(grad_hidden.double(), exact[0].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_weight.double(), exact[1].grad, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_bf16_weights_is_summed_in_fp32(monkeypatch):
    monkeypatch.setattr(head, "BLOCK_ELEMENTS", 20)  # several blocks of columns
    hidden, weight, loss = case(2, torch.bfloat16)
    expected = torch.zeros(COLUMNS, HIDDEN)
    for row in range(TOKENS):
        rows = slice(row, row + 1)
        gradient = hidden[rows].detach() @ weight.detach().t()
        stages.loss_and_gradient_(gradient, loss.rows(rows))
        expected += gradient.float().t() @ hidden[rows].detach().float()
    *_, grad_weight = run(chunked(loss, 1), hidden, weight)
    assert grad_weight.dtype == torch.bfloat16
    torch.testing.assert_close(grad_weight.float(), expected, rtol=2**-8, atol=1e-5)


def test_memory_stays_below_the_full_heads():
    vocab_size, num_tokens = 4096, 512
    _, labels, targets = make_case(3, num_tokens=num_tokens, vocab_size=vocab_size, k=5)
    loss = make_loss(labels, targets, vocab_size=vocab_size)
    hidden, weight = torch.randn(num_tokens, 16), torch.randn(vocab_size, 16)
    peaks = []
    for function in (full(loss), chunked(loss, 64)):
        with LiveMemory() as memory:
            run(function, hidden, weight)
        peaks.append(memory.peak)
    logits = num_tokens * vocab_size * 4
    assert peaks[0] > logits
    assert peaks[1] < 0.4 * logits


def test_no_gradients_are_made_where_none_are_asked_for():
    hidden, weight, loss = case(4)
    expected = run(chunked(loss), hidden, weight)
    with torch.no_grad(), LiveMemory() as memory:
        summed, terms = chunked(loss)(hidden, weight)
    assert torch.equal(summed, expected[0]) and torch.equal(terms, expected[1])
    assert memory.peak < weight.nbytes + 8192


def test_torch_accepts_the_operation():
    hidden, weight, loss = case(5)
    _, *settings = arguments(hidden, loss)
    row_weights = torch.rand(TOKENS)
    inputs = (hidden.detach(), weight.detach(), *settings, row_weights, 6, True)
    op = torch.ops.distill_pretrain.chunked_head.default
    opcheck(op, inputs)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(op, (hidden, weight, *inputs[2:]), test_utils=checks)


def test_compiled_whole_and_checkpointed_it_is_the_same():
    hidden, weight, loss = case(6)
    function = chunked(loss)
    expected = run(function, hidden, weight)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for again in (compiled, lambda *inputs: checkpoint(function, *inputs, use_reentrant=False)):
        for some, others in zip(run(again, hidden, weight), expected, strict=True):
            assert torch.equal(some, others)


def test_a_second_backward_is_refused():
    hidden, weight, loss = case(7)
    summed, _ = chunked(loss)(hidden * 1, weight)
    summed.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        summed.backward()


@pytest.mark.parametrize("fits", [True, False])
def test_the_cuda_kernels_give_the_same(fits, monkeypatch):
    launcher = emulated(launch.SOURCE)
    monkeypatch.setattr(stages, "launcher_for", lambda source, device: launcher)
    monkeypatch.setattr(launch, "fits_fused", lambda problem, blocks: fits)
    hidden, weight, loss = case(8, residual="ghost", smoothing=0.1)
    expected = run(chunked(loss), hidden, weight)
    found = run(chunked(replace(loss, backend="cuda")), hidden, weight)
    for some, others in zip(found, expected, strict=True):
        torch.testing.assert_close(some, others, rtol=1e-5, atol=1e-5)


def test_a_teacher_in_the_job_needs_the_full_head():
    with pytest.raises(ValueError, match="head: chunked is for cached targets"):
        ObjectiveConfig(target="teacher", kd_weight=1.0, head="chunked")
