from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from fake_models import VOCAB, RandomPlan, TableEngine
from test_heldout import evaluate_in_ranks

from distill_pretrain.errors import ConfigError
from distill_pretrain.eval.copying import CopiesPlan, draw_ids, id_counts
from distill_pretrain.eval.heldout import evaluate


class CopyingEngine(TableEngine):
    """A bigram model that adds `strength` to the logit of what followed every earlier occurrence of the token."""

    def __init__(self, seed: int, strength: float) -> None:
        super().__init__(seed)
        self.strength = strength

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        result = super().logits(tokens)
        for row, ids in enumerate(tokens.tolist()):
            for place, token in enumerate(ids):
                for earlier in range(place):
                    if ids[earlier] == token:
                        result[row, place, ids[earlier + 1]] += self.strength
        return result


def drawn(num_sequences: int = 5, length: int = 9, seed: int = 3) -> np.ndarray:
    counts = np.arange(VOCAB)
    return draw_ids(counts, num_sequences=num_sequences, length=length, seed=seed)


def losses(model: CopyingEngine, row: np.ndarray) -> tuple[float, float]:
    """Mean cross-entropy of both copies in float64, position by position."""
    first, again = [], []
    for before, token in itertools.pairwise(row):
        z = model.table[before].astype(np.float64)
        first.append(np.log(np.exp(z).sum()) - z[token])
        z[token] += model.strength
        again.append(np.log(np.exp(z).sum()) - z[token])
    return float(np.mean(first)), float(np.mean(again))


def test_losses_on_both_copies_equal_a_float64_reference() -> None:
    rows = drawn()
    model = CopyingEngine(1, 2.5)
    first, again = (evaluate({"m": model}, None, CopiesPlan(rows, k))["m"] for k in (False, True))
    expected = np.array([losses(model, row) for row in rows]).mean(0)
    assert (first.ce, again.ce) == pytest.approx(expected, rel=1e-6)
    assert first.num_positions == again.num_positions == 5 * 8
    assert again.ce < first.ce - 1


def test_a_model_of_bigrams_gains_nothing_from_the_first_copy() -> None:
    rows = drawn()
    model = {"m": TableEngine(1)}
    first, again = (evaluate(model, None, CopiesPlan(rows, k))["m"] for k in (False, True))
    assert again.ce == pytest.approx(first.ce, rel=1e-12)


def test_ranks_share_the_sequences() -> None:
    plan = CopiesPlan(drawn(), True)
    engines, teacher = {"m": CopyingEngine(1, 2.5)}, CopyingEngine(9, 1.0)
    alone = evaluate(engines, teacher, plan)
    for scores in evaluate_in_ranks(3, engines=engines, teacher=teacher, plan=plan):
        assert {k: v.as_dict() for k, v in scores.items()} == {
            k: v.as_dict() for k, v in alone.items()
        }


def test_ids_are_drawn_as_often_as_in_text_and_once_in_a_sequence() -> None:
    plan = RandomPlan()
    counts = id_counts(plan, 11, VOCAB)
    labels = plan.labels[plan.labels >= 0]
    assert counts.tolist() == [int((labels == token).sum()) for token in range(VOCAB)]
    counts = np.zeros(VOCAB, np.int64)
    counts[[3, 5, 8, 30]] = [1, 2, 3, 6]
    rows = draw_ids(counts, num_sequences=4000, length=3, seed=1)
    assert rows.dtype == np.int32 and all(len(set(row)) == 3 for row in rows.tolist())
    assert set(rows.ravel().tolist()) == {3, 5, 8, 30}
    shares = [(rows[:, 0] == token).mean() for token in (3, 5, 8, 30)]
    assert shares == pytest.approx([1 / 12, 2 / 12, 3 / 12, 6 / 12], abs=0.03)


def test_a_sequence_depends_on_the_seed_and_its_number_alone() -> None:
    assert np.array_equal(drawn(2), drawn(5)[:2])
    assert not np.array_equal(drawn(5, seed=4), drawn(5))
    assert not np.array_equal(drawn()[0], drawn()[1])


def test_too_few_ids_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"eval\.copying\.length"):
        drawn(length=VOCAB)
