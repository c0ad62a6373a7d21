"""Separate documents in the student: exact, whichever documents stand before, and the same under every layout."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

from distill_pretrain.contracts import IGNORED_LABEL, SparseTargets, TokenBatch
from distill_pretrain.corpus.sequence_plan import pieces_of
from distill_pretrain.errors import ConfigError
from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.processes.process import process_group, released_groups
from tests.support.distributed import run_distributed
from tests.support.layouts import GPT2, LLAMA, SEQ_LEN, VOCAB_SIZE, make_job, run_cases

END, STEPS = 5, 2
TOLERANCE = 1e-5
MODELS = {"llama": LLAMA, "gpt2": GPT2}
A = 13
"""Tokens of the first document; the second one fills the sequence."""


def batch_of(first: np.ndarray, second: np.ndarray, *, separate: bool) -> TokenBatch:
    """Two sequences of both documents, with labels and targets in the second document alone."""
    tokens = np.tile(np.concatenate((first, second)), (2, 1)).astype(np.int64)
    labels = np.full_like(tokens, IGNORED_LABEL)
    labels[:, A:-1] = tokens[:, A + 1 :]
    ids = np.full((*tokens.shape, 2), -1)
    ids[:, A:-1] = np.stack((labels[:, A:-1], (labels[:, A:-1] + 1) % VOCAB_SIZE), axis=-1)
    return TokenBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        targets=SparseTargets(
            ids=torch.from_numpy(ids),
            probs=torch.from_numpy(np.where(ids >= 0, 0.5, 0.0).astype(np.float32)),
        ),
        pieces=torch.from_numpy(pieces_of(tokens, END)) if separate else None,
    )


@pytest.mark.parametrize("name", MODELS)
def test_losses_of_a_document_do_not_depend_on_the_one_before_it(name):
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.mcore.student.base import forward_micro_batch

    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    a, other, b = (draw.integers(6, VOCAB_SIZE, n) for n in (A, A, SEQ_LEN - A))
    a[-1] = other[-1] = b[-1] = END
    layout = ParallelConfig()
    with process_group(), released_groups(), model_parallel(layout, seed=1) as groups:
        student, _ = make_job(MODELS[name], layout, groups, kd=True, steps=1)
        student.require_documents_apart()

        def terms(first: np.ndarray, separate: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
            model = student.chunks[0]
            model.zero_grad_buffer()
            found = forward_micro_batch(model, batch_of(first, b, separate=separate))
            found[0].backward()
            return found.detach(), [p.main_grad.clone() for p in model.parameters()]

        apart, gradients = terms(a, True)
        again, gradients_too = terms(other, True)
        joined, joined_too = terms(a, False)[0], terms(other, False)[0]
        alone = alone_terms(student, b)
    assert apart.abs().min() > 0
    assert torch.equal(apart, again)
    assert all(map(torch.equal, gradients, gradients_too))
    assert (joined - joined_too).abs().max() > 1e-4
    assert alone == pytest.approx(apart.tolist(), rel=1e-5)


def alone_terms(student: Any, document: np.ndarray) -> list[float]:
    """Of the document in a sequence of its own, by attention as it is without documents."""
    from distill_pretrain.mcore.student.base import forward_micro_batch

    # Padding behind it changes nothing: attention is causal, and it has no labels.
    padded = np.concatenate((document, np.full(A, 7)))
    whole = batch_of(np.full(A, 7), document, separate=False)
    moved = {
        "tokens": torch.from_numpy(np.tile(padded, (2, 1))),
        "labels": whole.labels.roll(-A, dims=1),
        "targets": SparseTargets(
            ids=whole.targets.ids.roll(-A, dims=1), probs=whole.targets.probs.roll(-A, dims=1)
        ),
    }
    found: list[float] = forward_micro_batch(student.chunks[0], TokenBatch(**moved)).tolist()
    return found


def cases(layouts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        f"{layout}/{name}": {
            "model": model,
            "parallel": parallel,
            "kd": name == "llama",
            "steps": STEPS,
            "document_end": END,
        }
        for layout, parallel in layouts.items()
        for name, model in MODELS.items()
    }


@pytest.mark.slow
def test_curves_equal_one_process():
    reference = run_cases(cases({"one": {}}))
    joined = {**cases({"one": {}})["one/llama"], "document_end": None}
    assert run_cases({"joined": joined})["joined"]["loss"] != reference["one/llama"]["loss"]
    layouts = {
        "tp2+sequence+recompute": {"tensor": 2, "sequence_parallel": True, "recompute": "full"},
        "tp2+selective": {
            "tensor": 2,
            "recompute": "selective",
            "recompute_modules": ["core_attn"],
        },
        "pp2": {"pipeline": 2},
        "interleaved pp2": {"pipeline": 2, "virtual_pipeline": 2},
        "dp2+distributed optimizer": {"distributed_optimizer": True},
        "cp2": {"context": 2},
        "cp2+recompute": {"context": 2, "recompute": "full"},
    }
    every = cases(layouts)
    if importlib.util.find_spec("deepspeed") is not None:
        zero = {"optimizer": {"backend": "deepspeed", "zero_stage": 3}}
        every |= {name: {**case, **zero} for name, case in cases({"zero3": {}}).items()}
    found = run_distributed(run_cases, 2, cases=every)
    for name, curves in found.items():
        expected = reference["one" + name[name.rindex("/") :]]
        for term in ("loss", "ce", "kl", "grad_norm"):
            assert curves[term] == pytest.approx(expected[term], abs=TOLERANCE), (name, term)


def test_layers_that_cannot_keep_documents_apart_are_refused_by_name():
    from distill_pretrain.mcore.model.modules import require_documents_apart

    with pytest.raises(ConfigError, match=r"do not keep documents apart.*torch\.nn.*Linear"):
        require_documents_apart([torch.nn.Linear(1, 1)])


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_ranks_attend_as_a_whole_sequence_does(size, monkeypatch):
    """Every rank's part of attention within documents, beside float64 attention under a mask."""
    from distill_pretrain.mcore.model import modules
    from distill_pretrain.processes.context import context_spans

    draw = torch.Generator().manual_seed(1)
    rows, length, heads, groups, width = 2, 32, 4, 2, 8
    tokens = torch.randint(0, 8, (rows, length), generator=draw).numpy()
    tokens[1] = 1  # one document
    pieces = torch.from_numpy(pieces_of(tokens, END))
    assert len(pieces) > 4
    q, k, v = (torch.randn(rows, n, length, width, generator=draw) for n in (heads, groups, groups))
    belongs = torch.zeros(rows, length, dtype=torch.int64)
    for number, (row, start, stop) in enumerate(pieces.tolist()):
        belongs[row, start:stop] = number
    mask = (belongs[:, None, :, None] == belongs[:, None, None]) & torch.ones(
        length, length
    ).tril().bool()
    k_all, v_all = (x.double().repeat_interleave(heads // groups, 1) for x in (k, v))
    scores = q.double() @ k_all.transpose(-1, -2) / width**0.5
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v_all

    class Config:
        context_parallel_size = size

    attention = modules.SDPAttention.__new__(modules.SDPAttention)
    torch.nn.Module.__init__(attention)
    attention.config, attention.softmax_scale, attention.sinks = Config(), None, None
    for rank in range(size):
        monkeypatch.setattr(
            modules.parallel_state, "get_context_parallel_rank", lambda rank=rank: rank
        )
        places = torch.cat([torch.arange(*span) for span in context_spans(length, rank, size)])
        found = attention._attend_within(pieces, q[:, :, places], k, v, 0.0)
        torch.testing.assert_close(found.double(), expected[:, :, places], atol=1e-5, rtol=1e-5)
