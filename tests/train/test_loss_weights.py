"""Labels that differ in weight: float64 gradients, and the same mean under every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from distill_pretrain.contracts import IGNORED_LABEL, SparseTargets, TokenBatch
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.losses.dense_kd import TeacherObjective
from distill_pretrain.losses.sparse_kd import DistillationObjective
from distill_pretrain.processes.process import process_group, released_groups
from tests.support.distributed import run_distributed
from tests.support.layouts import LLAMA, SEQ_LEN, make_job, run_cases, take_step

V, B, L, H = 11, 3, 7, 5
STEPS, TOLERANCE = 3, 1e-5


def a_batch() -> tuple[TokenBatch, torch.Tensor]:
    """Labels, some of them left out, with targets and weights; and the targets whole, [B, L, V]."""
    draw = torch.Generator().manual_seed(4)
    labels = torch.randint(0, V, (B, L), generator=draw)
    labels[0, :3] = IGNORED_LABEL
    ids = torch.stack([labels.clamp(min=0), (labels.clamp(min=0) + 2) % V], dim=-1)
    probs = torch.tensor([0.75, 0.25]).expand(B, L, 2).clone()
    weights = torch.rand(B, L, generator=draw) * 3
    whole = torch.zeros(B, L, V, dtype=torch.float64).scatter_(2, ids, probs.double())
    batch = TokenBatch(
        tokens=labels.clamp(min=0),
        labels=labels,
        targets=SparseTargets(
            ids=ids.masked_fill((labels < 0)[..., None], -1),
            probs=probs.masked_fill((labels < 0)[..., None], 0.0),
        ),
        weights=weights,
    )
    return batch, whole


class Whole:
    """A teacher of given probabilities."""

    vocab_size = V
    device = torch.device("cpu")

    def __init__(self, probs: torch.Tensor) -> None:
        self.probs = iter(probs)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.log(next(self.probs) + 1e-30).float()[None]


@pytest.mark.parametrize("kind", ["full", "chunked", "teacher"])
def test_sums_and_gradients_are_those_of_float64(kind):
    batch, probs = a_batch()
    draw = torch.Generator().manual_seed(5)
    hidden, head = torch.randn(L, B, H, generator=draw), torch.randn(V, H, generator=draw)
    exact = [x.double().requires_grad_() for x in (hidden, head)]
    log_q = (exact[0] @ exact[1].t()).log_softmax(-1).transpose(0, 1)
    valid = batch.labels >= 0
    ce = -log_q.gather(2, batch.labels.clamp(min=0)[..., None])[..., 0]
    kl = (torch.special.xlogy(probs, probs) - probs * log_q).sum(-1)
    weights = batch.weights.double() * valid
    expected = [(weights * term).sum() for term in (0.3 * ce + 0.7 * kl, ce, kl)]
    (2 * expected[0]).backward()

    config = {"ce_weight": 0.3, "kd_weight": 0.7}
    given = {"vocab_size": V, "tensor_group": None}
    if kind == "teacher":
        settings = ObjectiveConfig(**config, target="teacher")
        objective: Any = TeacherObjective(Whole(probs), settings, **given)
    else:
        chunk = 4 if kind == "chunked" else None
        objective = DistillationObjective(ObjectiveConfig(**config), **given, chunk_tokens=chunk)
    found = [x.clone().requires_grad_() for x in (hidden, head)]
    if kind == "chunked":
        terms = objective.from_hidden(*found, batch=batch)
    else:
        terms = objective(found[0] @ found[1].t(), batch)
    (2 * terms[0]).backward()
    assert terms.tolist() == pytest.approx([float(term.detach()) for term in expected], rel=1e-5)
    for some, others in zip(found, exact, strict=True):
        torch.testing.assert_close(some.grad.double(), others.grad, rtol=1e-5, atol=1e-5)


def curves(layouts: dict[str, dict[str, Any]], **more: Any) -> dict[str, dict[str, Any]]:
    case = {"model": LLAMA, "kd": True, "steps": STEPS, "weighted": 1.0}
    return {name: {**case, "parallel": layout, **more} for name, layout in layouts.items()}


def differ_by(some: dict[str, list[float]], others: dict[str, list[float]]) -> float:
    return max(
        float(np.abs(np.subtract(some[term], others[term])).max())
        for term in ("loss", "ce", "kl", "grad_norm")
    )


def test_a_step_is_a_weighted_mean():
    """One step of weighted sequences, beside what each of them says alone."""
    from distill_pretrain.mcore.model.config import ParallelConfig
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    torch.set_num_threads(1)
    layout = ParallelConfig()
    with process_group(), released_groups(), model_parallel(layout, seed=1) as groups:
        student, batches = make_job(LLAMA, layout, groups, kd=True, steps=1, weighted=1.0)
        plain = make_job(LLAMA, layout, groups, kd=True, steps=1)[1]
        sums, tokens, weight = torch.zeros(3, dtype=torch.float64), 0, 0.0
        for some, others in zip(
            batches.step_batches(0, with_targets=True),
            plain.step_batches(0, with_targets=True),
            strict=True,
        ):
            assert others.weights is None and some.weights is not None
            # One weight at a time, by leaving all other labels out.
            for value in some.weights.unique().tolist():
                here = some.weights == value
                labels = others.labels.masked_fill(~here, IGNORED_LABEL)
                ids = others.targets.ids.masked_fill(~here[..., None], -1)
                targets = SparseTargets(ids=ids, probs=others.targets.probs * here[..., None])
                part = TokenBatch(tokens=others.tokens, labels=labels, targets=targets)
                student.num_micro_batches = 1
                terms, count = student.evaluate([iter([part])])
                sums += value * terms
                tokens += int(count)
                weight += value * count
        student.num_micro_batches = batches.num_micro_batches
        result = take_step(student, batches, 0)
    assert result.num_tokens == tokens
    assert result.terms.tolist() == pytest.approx((sums / weight).tolist(), rel=1e-5)
    assert abs(float(result.terms[0]) - 4.4) < 1.5


def test_only_ratios_count_and_even_weights_are_none():
    cases = {
        **curves({"uneven": {}}),
        **curves({"scaled": {}}, weighted=0.001),
        **curves({"none": {}}, weighted=None),
    }
    found = run_cases(cases)
    # Sums of weights below 1 divide, too.
    assert differ_by(found["uneven"], found["scaled"]) <= TOLERANCE
    assert differ_by(found["uneven"], found["none"]) > 1e-3


def test_an_evaluation_does_not_weigh_in_the_next_step():
    from distill_pretrain.mcore.model.config import ParallelConfig
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    torch.set_num_threads(1)
    layout, norms = ParallelConfig(), []
    with process_group(), released_groups(), model_parallel(layout, seed=1) as groups:
        for evaluates in (False, True):
            student, batches = make_job(LLAMA, layout, groups, kd=True, steps=1, weighted=1.0)
            if evaluates:
                student.evaluate([iter(batches.step_batches(1, with_targets=True))])
            norms.append(take_step(student, batches, 0).grad_norm)
    assert norms[0] == norms[1] > 0


LAYOUTS = {
    "tp2+sequence": {"tensor": 2, "sequence_parallel": True},
    "pp2": {"pipeline": 2},
    "interleaved pp2": {"pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
    "dp2+distributed optimizer": {"distributed_optimizer": True},
}


@pytest.mark.slow
def test_curves_equal_one_process():
    reference = run_cases(curves({"one": {}}))["one"]
    found = run_distributed(run_cases, 2, cases=curves(LAYOUTS))
    for name, curve in found.items():
        assert differ_by(curve, reference) <= TOLERANCE, name


@pytest.mark.slow
def test_zero_gives_the_same_mean():
    pytest.importorskip("deepspeed")
    cases = {
        f"zero {stage}": {
            **curves({"": {}})[""],
            "optimizer": {"backend": "deepspeed", "zero_stage": stage},
        }
        for stage in (1, 3)
    }
    reference = run_cases(curves({"one": {}}))["one"]
    for name, curve in run_distributed(run_cases, 2, cases=cases).items():
        assert differ_by(curve, reference) <= TOLERANCE, name


def test_weights_reach_the_columns_of_a_context_parallel_rank():
    from distill_pretrain.data.batches import BatchSource, StudentBatches
    from tests.support.layouts import WalkPlan, uneven_weights

    source = BatchSource(
        plan=WalkPlan(), cache=None, num_sequences=64, label_weights=lambda n: uneven_weights(1, n)
    )
    settings = {"seed": 3, "global_batch_size": 4, "micro_batch_size": 2, "data_rank": 0}
    settings |= {"data_size": 1, "device": torch.device("cpu")}
    whole = StudentBatches([source], **settings)
    for rank in range(2):
        part = StudentBatches([source], **settings, context_rank=rank, context_size=2)
        for some, others in zip(
            part.host_batches(1, False), whole.host_batches(1, False), strict=True
        ):
            assert torch.equal(some.weights, others.weights[:, part.positions])
            assert some.weights.shape == (2, SEQ_LEN // 2)
