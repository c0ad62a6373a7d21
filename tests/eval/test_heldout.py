from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from fake_models import RandomPlan, TableEngine, dense_reference

from distill_pretrain.errors import ConfigError, TeacherError, TokenDataError, TokenizerMismatch
from distill_pretrain.eval import metrics
from distill_pretrain.eval.heldout import evaluate
from distill_pretrain.eval.metrics import ModelScores, PairedDifference, sequence_sums

FIGURES = ("num_positions", "ce", "kl", "top1_accuracy", "top1_agreement", "teacher_entropy")


def engines() -> dict[str, TableEngine]:
    return {"a": TableEngine(1), "b": TableEngine(2)}


def evaluate_in_ranks(world_size: int, **arguments: object) -> list[dict[str, ModelScores]]:
    """One thread per rank; the all-reduce is a sum at a barrier."""
    barrier = threading.Barrier(world_size)
    states: list[torch.Tensor | None] = [None] * world_size
    results: list[object] = [None] * world_size

    def run(rank: int) -> None:
        def all_reduce_sum(state: torch.Tensor) -> None:
            states[rank] = state.clone()
            barrier.wait(20)
            state.copy_(sum(s for s in states if s is not None))
            barrier.wait(20)

        try:
            results[rank] = evaluate(
                rank=rank, world_size=world_size, all_reduce_sum=all_reduce_sum, **arguments
            )
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results  # type: ignore[return-value]


def test_figures_equal_a_float64_reference() -> None:
    plan, models, teacher = RandomPlan(), engines(), TableEngine(9)
    scores = evaluate(models, teacher, plan, micro_batch_size=4)
    assert list(scores) == ["a", "b", "teacher"]
    for name, model in {**models, "teacher": teacher}.items():
        expected = dense_reference(plan, model, teacher)
        for figure in FIGURES:
            found = getattr(scores[name], figure)
            assert found == pytest.approx(expected[figure], rel=1e-6, abs=1e-7), (name, figure)
        assert scores[name].perplexity == pytest.approx(math.exp(expected["ce"]), rel=1e-6)
    assert scores["teacher"].kl == 0
    assert scores["a"].kl > 0.1


def test_without_a_teacher_there_is_no_kl() -> None:
    score = evaluate(engines(), None, RandomPlan())["a"]
    assert (score.kl, score.top1_agreement, score.teacher_entropy) == (None, None, None)


def test_world_size_and_micro_batch_size_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = RandomPlan()
    reference = evaluate(engines(), TableEngine(9), plan, micro_batch_size=1)
    monkeypatch.setattr(metrics, "_CHUNK_ELEMENTS", 5 * 37)
    for world_size, micro_batch_size in ((1, 4), (3, 1), (3, 2), (12, 4)):
        ranks = evaluate_in_ranks(
            world_size,
            engines=engines(),
            teacher=TableEngine(9),
            plan=plan,
            micro_batch_size=micro_batch_size,
        )
        for scores in ranks:
            for name in reference:
                assert scores[name].as_dict() == reference[name].as_dict()


def test_the_teacher_runs_once_per_micro_batch() -> None:
    teacher = TableEngine(9)
    evaluate(engines(), teacher, RandomPlan(11), micro_batch_size=4)
    assert teacher.calls == 3


def test_num_sequences_takes_the_first_ones() -> None:
    plan = RandomPlan()
    head = RandomPlan()
    head.num_sequences = 4
    first = evaluate(engines(), None, plan, num_sequences=4)["a"]
    assert first.num_sequences == 4
    assert first.num_positions == int((plan.labels[:4] >= 0).sum())
    assert first.as_dict() == evaluate(engines(), None, head)["a"].as_dict()
    assert evaluate(engines(), None, plan, num_sequences=99)["a"].num_sequences == 11


def test_nan_logits_name_model_and_sequences_on_every_rank() -> None:
    models = {"good": TableEngine(1), "bad": TableEngine(2, nan_at=7)}
    results = evaluate_in_ranks(3, engines=models, teacher=TableEngine(9), plan=RandomPlan())
    for error in results:
        assert isinstance(error, TeacherError)
        assert "model bad, held-out sequences 7;" in str(error)
    teacher = TableEngine(9, nan_at=2)
    with pytest.raises(TeacherError, match="model teacher, held-out sequences 2;"):
        evaluate(engines(), teacher, RandomPlan())


def test_infinite_logits_are_refused() -> None:
    model = TableEngine(1)
    model.table[:, 3] = -np.inf
    with pytest.raises(TeacherError, match="model a, held-out sequences 0, 1, 2, 3, 4, 5, 6, 7"):
        evaluate({"a": model}, None, RandomPlan())


def test_another_vocabulary_is_refused() -> None:
    models = {**engines(), "c": TableEngine(3, vocab_size=40)}
    with pytest.raises(TokenizerMismatch, match="c: 40"):
        evaluate(models, None, RandomPlan())
    with pytest.raises(TokenizerMismatch, match="teacher: 40"):
        evaluate(engines(), TableEngine(3, vocab_size=40), RandomPlan())


def test_a_model_cannot_take_the_teachers_name() -> None:
    with pytest.raises(ConfigError, match=r"eval\.models\.teacher"):
        evaluate({"teacher": TableEngine(1)}, TableEngine(9), RandomPlan())


def test_a_corpus_of_padding_is_refused() -> None:
    plan = RandomPlan()
    plan.labels[:] = -100
    with pytest.raises(TokenDataError):
        evaluate(engines(), None, plan)


def test_states_of_split_batches_add_up() -> None:
    plan = RandomPlan()
    tokens, labels = (torch.from_numpy(x).long() for x in plan.read(np.arange(11)))
    logits = TableEngine(1).logits(tokens)
    whole = sequence_sums(logits, labels)
    parts = [sequence_sums(logits[rows], labels[rows]) for rows in (slice(0, 4), slice(4, 11))]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.dtype == torch.float64
    assert whole[-1, 0] == int((plan.labels[-1] >= 0).sum())


def test_paired_difference_is_of_the_same_positions() -> None:
    plan = RandomPlan()
    scores = evaluate(engines(), TableEngine(9), plan)
    pair = PairedDifference.of(scores["a"], scores["b"], "ce")
    assert pair.difference == pytest.approx(scores["a"].ce - scores["b"].ce, abs=1e-12)
    back = PairedDifference.of(scores["b"], scores["a"], "ce")
    assert back.difference == pytest.approx(-pair.difference)
    assert back.standard_error == pytest.approx(pair.standard_error)
    assert PairedDifference.of(scores["a"], scores["a"], "kl").standard_error == 0


def test_standard_error_covers_what_it_says() -> None:
    """Over many samples of sequences the error is the spread of the mean."""
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        sums = np.zeros((50, len(metrics.FIELDS)))
        sums[:, 0] = rng.integers(5, 40, 50)
        sums[:, 1] = sums[:, 0] * (3 + 0.5 * rng.standard_normal(50))
        score = ModelScores.of(sums, has_teacher=False)
        means.append(score.ce)
        errors.append(score.ce_standard_error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.12)
    one = ModelScores.of(sums[:1], has_teacher=False)
    assert one.ce_standard_error is None
