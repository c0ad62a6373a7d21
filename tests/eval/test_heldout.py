from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from fake_models import (
    SEQ_LEN,
    VOCAB,
    DrawnCache,
    RandomPlan,
    TableEngine,
    accepted_reference,
    cache_reference,
    dense_reference,
)
from torch.utils._python_dispatch import TorchDispatchMode

from distill_pretrain.contracts import Replica
from distill_pretrain.errors import (
    CacheMismatch,
    ConfigError,
    TeacherError,
    TokenDataError,
    TokenizerMismatch,
)
from distill_pretrain.eval import chunks
from distill_pretrain.eval.heldout import evaluate
from distill_pretrain.eval.metrics import ModelScores, PairedDifference, ScoreSettings

FIGURES = (
    "num_positions",
    "ce",
    "kl",
    "top1_accuracy",
    "top1_agreement",
    "teacher_entropy",
    "acceptance",
)


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
            replica = Replica(number=rank, count=world_size)
            results[rank] = evaluate(replica=replica, all_reduce_sum=all_reduce_sum, **arguments)
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
    assert scores["teacher"].acceptance == pytest.approx(1, abs=1e-6)
    assert scores["a"].kl > 0.1
    assert 0 < scores["a"].acceptance < 0.9


def test_accepted_length_equals_the_distribution_of_the_first_rejection() -> None:
    plan, models, teacher = RandomPlan(), engines(), TableEngine(9)
    settings = ScoreSettings(draft_lengths=(1, 2, 5, 13))
    scores = evaluate(models, teacher, plan, micro_batch_size=4, settings=settings)
    for name, model in {**models, "teacher": teacher}.items():
        found = scores[name].accepted_length
        assert list(found) == ["1", "2", "5", "13"]
        for k in (1, 2, 5):
            expected = accepted_reference(plan, model, teacher, k)
            assert found[str(k)] == pytest.approx(expected, rel=1e-6), (name, k)
        assert found["13"] is None  # longer than a sequence
    assert scores["a"].accepted_length["1"] == pytest.approx(scores["a"].acceptance, rel=1e-12)
    assert scores["teacher"].accepted_length["5"] == pytest.approx(5, abs=1e-5)


def test_without_a_teacher_there_is_nothing_to_compare_with() -> None:
    score = evaluate(engines(), None, RandomPlan())["a"]
    assert (score.kl, score.top1_agreement, score.teacher_entropy) == (None, None, None)
    assert (score.acceptance, score.accepted_length) == (None, None)
    assert (score.kl_cache, score.cross_entropy_cache, score.num_cache_positions) == (None,) * 3


def test_figures_against_a_cache_equal_a_float64_reference() -> None:
    plan, models, teacher = RandomPlan(), engines(), TableEngine(9)
    cache = DrawnCache(plan, teacher)
    scores = evaluate(models, None, plan, micro_batch_size=4, cache=cache)
    for name, model in models.items():
        for figure, expected in cache_reference(plan, model, cache).items():
            assert getattr(scores[name], figure) == pytest.approx(expected, rel=1e-6), (
                name,
                figure,
            )
    assert scores["a"].num_cache_positions < scores["a"].num_positions
    both = evaluate(models, teacher, plan, cache=cache)
    assert both["a"].kl_cache == pytest.approx(scores["a"].kl_cache, rel=1e-12)
    pair = PairedDifference.of(scores["a"], scores["b"], "cross_entropy_cache")
    assert pair.difference == pytest.approx(scores["a"].kl_cache - scores["b"].kl_cache, rel=1e-9)


def test_sampled_caches_estimate_cross_entropy_without_bias_and_overestimate_kl() -> None:
    """As the docstring of ModelScores says, over 60 caches of the same teacher."""
    plan, teacher = RandomPlan(), TableEngine(9)
    models = engines()
    found = []
    for seed in range(60):
        scores = evaluate(models, None, plan, cache=DrawnCache(plan, teacher, seed=seed))
        found.append([f(scores[m]) for m in models for f in (lambda s: s.kl_cache, cross_entropy)])
    mean, error = np.mean(found, 0), np.std(found, 0) / math.sqrt(len(found))
    exact = evaluate(models, teacher, plan)
    for number, name in enumerate(models):
        kl_cache, cross = mean[2 * number : 2 * number + 2]
        true_cross = exact[name].kl + exact[name].teacher_entropy
        assert abs(cross - true_cross) < 4 * error[2 * number + 1]
        assert kl_cache > exact[name].kl + 10 * error[2 * number]
    gap = np.array(found)[:, 0] - np.array(found)[:, 2]
    assert abs(gap.mean() - (exact["a"].kl - exact["b"].kl)) < 4 * gap.std() / math.sqrt(len(gap))


def cross_entropy(score: ModelScores) -> float:
    return score.cross_entropy_cache


def test_a_cache_without_any_target_is_refused() -> None:
    plan = RandomPlan()
    cache = DrawnCache(plan, TableEngine(9))
    cache.counts[:] = 0
    with pytest.raises(CacheMismatch, match="no target"):
        evaluate(engines(), None, plan, cache=cache)


def test_world_size_and_micro_batch_size_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = RandomPlan()
    cache = DrawnCache(plan, TableEngine(9))
    reference = evaluate(engines(), TableEngine(9), plan, cache=cache, micro_batch_size=1)
    assert sum(count > 0 for count in reference["a"].reliability["positions"]) > 8
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 5 * 37)
    for world_size, micro_batch_size in ((1, 4), (3, 1), (3, 2), (12, 4)):
        ranks = evaluate_in_ranks(
            world_size,
            engines=engines(),
            teacher=TableEngine(9),
            plan=plan,
            cache=cache,
            micro_batch_size=micro_batch_size,
        )
        for scores in ranks:
            for name in reference:
                assert scores[name].as_dict() == reference[name].as_dict()


def test_models_by_chunks_of_any_sizes_score_as_whole_logits_do() -> None:
    """And of each model one chunk exists at a time; a micro-batch is one pass of the teacher for all models."""
    plan = RandomPlan()
    cache = DrawnCache(plan, TableEngine(9))
    whole = evaluate(engines(), TableEngine(9), plan, cache=cache, micro_batch_size=4)
    models = {"a": TableEngine(1, chunk_tokens=7), "b": TableEngine(2)}
    teacher = TableEngine(9, chunk_tokens=13)
    with LargestTensor() as seen:
        scores = evaluate(models, teacher, plan, cache=cache, micro_batch_size=4)
    for name in whole:
        assert scores[name].as_dict() == whole[name].as_dict(), name
    assert teacher.most_alive == models["a"].most_alive == 1
    assert teacher.calls == 3
    assert 13 * VOCAB <= seen.most <= VOCAB * VOCAB < 4 * SEQ_LEN * VOCAB


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor over the vocabulary, the bigram table itself among them."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and VOCAB in tensor.shape:
                self.most = max(self.most, tensor.numel())
        return result


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
        sums = np.zeros((50, len(ScoreSettings().columns)))
        sums[:, 0] = rng.integers(5, 40, 50)
        sums[:, 1] = sums[:, 0] * (3 + 0.5 * rng.standard_normal(50))
        score = scores_of(sums)
        means.append(score.ce)
        errors.append(score.ce_standard_error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.12)
    assert scores_of(sums[:1]).ce_standard_error is None


def scores_of(sums: np.ndarray) -> ModelScores:
    return ModelScores.of(
        sums, np.ones((15, 3)), settings=ScoreSettings(), has_teacher=False, has_cache=False
    )
