"""Figures of the samplers: formulas against brute force, and against targets that are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from distill_pretrain.contracts import LogitsChunk, Replica
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import SequenceData, open_sequences
from distill_pretrain.errors import TeacherError
from distill_pretrain.sampling.samplers import Sampler, sample_targets
from distill_pretrain.teacher.estimator_sums import SamplerFigures
from distill_pretrain.teacher.estimators import (
    EstimatorStudy,
    moved_by_batch_shape,
    softmax64,
    study_estimators,
)
from tests.support.small_corpus import SEQ_LEN, VOCAB_SIZE, write_small_corpus


class Peaked:
    """A teacher whose logits are a fixed function of token and position."""

    vocab_size = VOCAB_SIZE
    device = torch.device("cpu")
    replica = Replica()
    identity: dict[str, Any] = {"kind": "megatron"}  # noqa: RUF012

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.size(1)) + 31 * tokens
        columns = torch.arange(VOCAB_SIZE)
        return 4 * torch.sin(places[..., None] * (columns + 1.0) * 0.7371).float()

    def chunks(self, tokens: torch.Tensor) -> Iterator[LogitsChunk]:
        for number, some in enumerate(self.logits(tokens).flatten(0, 1).split(50)):
            yield LogitsChunk(first=50 * number, first_id=0, logits=some)


class Moody(Peaked):
    """One whose logits depend on the batch's size."""

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().logits(tokens) * (1 + 0.01 * tokens.size(0))


def sampler(name: str, num_draws: int, top_p: float | None = None) -> Sampler:
    return Sampler(name=name, num_draws=num_draws, seed=3, top_p=top_p)


SAMPLERS = [
    sampler("multinomial", 8),
    sampler("systematic", 8),
    sampler("multinomial", 30),
    sampler("systematic", 30),
    sampler("topk", 8),
    sampler("topp", 30, 0.8),
]


@pytest.fixture(scope="module")
def sequences(tmp_path_factory) -> SequenceData:
    prefix = write_small_corpus(tmp_path_factory.mktemp("tokens") / "train")
    return open_sequences(DataConfig(tokens=prefix, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN))


@pytest.fixture(scope="module")
def study(sequences) -> EstimatorStudy:
    return study_estimators(Peaked(), sequences, SAMPLERS, num_sequences=12, micro_batch_size=5)


def figures(study: EstimatorStudy, name: str, num_draws: int) -> SamplerFigures:
    return next(
        f for f in study.samplers if (f.sampler.name, f.sampler.num_draws) == (name, num_draws)
    )


@pytest.fixture(scope="module")
def teacher(sequences) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, softmax and positions of all labelled positions."""
    tokens, labels = sequences.plan.read(np.arange(12))
    valid = (labels >= 0).reshape(-1)
    logits = Peaked().logits(torch.from_numpy(tokens).long()).reshape(-1, VOCAB_SIZE).numpy()[valid]
    return logits, softmax64(logits), np.arange(len(valid), dtype=np.uint64)[valid]


def test_the_teacher_s_own_figures(study, teacher):
    probs = teacher[1]
    assert study.positions == len(probs)
    assert study.entropy == pytest.approx(-(probs * np.log(probs)).sum(1).mean())
    assert study.top1 == pytest.approx(probs.max(1).mean())


def test_exact_errors_are_the_variances_of_draws(study):
    for found in study.samplers:
        assert found.error_drawn == pytest.approx(found.error_formula_there, rel=0.05)
        assert found.error == pytest.approx(found.error_formula_there, rel=0.2)
        if found.sampler.kind == "counts":
            assert abs(found.top1_deviation) < 4
            assert found.bias < 1e-6 and found.bias_renormalised is None


@pytest.mark.parametrize(("name", "num_draws", "top_p"), [("topk", 8, None), ("topp", 30, 0.8)])
def test_truncated_targets_have_the_bias_of_brute_force(study, teacher, name, num_draws, top_p):
    logits, probs, positions = teacher
    targets = sample_targets(
        logits, positions, sampler=name, num_draws=num_draws, seed=0, top_p=top_p
    )
    dense = np.zeros_like(probs)
    dense[np.repeat(np.arange(len(probs)), targets.entries_per_token), targets.ids] = (
        targets.probs()
    )
    scaled = dense / dense.sum(1, keepdims=True)
    found = figures(study, name, num_draws)
    assert found.error == pytest.approx(((dense - probs) ** 2).sum(1).mean(), rel=1e-4)
    assert found.error_renormalised == pytest.approx(
        ((scaled - probs) ** 2).sum(1).mean(), rel=1e-4
    )
    assert found.bias == pytest.approx(np.abs(dense - probs).sum(1).mean(), rel=1e-4)
    assert found.bias_renormalised == pytest.approx(np.abs(scaled - probs).sum(1).mean(), rel=1e-4)
    assert found.unique_ids == targets.entries_per_token.mean()
    assert found.raw_bytes == 3 * found.unique_ids
    assert 0 < found.hc_bytes < found.raw_bytes


def test_ratios_are_those_of_variances_at_equal_draws_and_at_equal_entries(study, teacher):
    probs = teacher[1]
    assert [ratio.num_draws for ratio in study.ratios] == [8, 30]
    for ratio in study.ratios:
        n = ratio.num_draws
        of = {name: figures(study, name, n) for name in ("multinomial", "systematic")}
        errors = {name: found.error for name, found in of.items()}
        assert ratio.at_equal_draws == pytest.approx(errors["multinomial"] / errors["systematic"])
        equal = ratio.draws_at_equal_entries
        entries = (1 - (1 - probs) ** equal).sum(1).mean()
        assert entries == pytest.approx(of["systematic"].unique_ids, rel=2e-3)
        variance = (probs * (1 - probs)).sum(1).mean() / equal
        assert ratio.at_equal_entries == pytest.approx(variance / errors["systematic"], rel=1e-6)
        assert 1 < ratio.at_equal_entries < ratio.at_equal_draws


def test_targets_that_move_with_the_batch_shape_are_counted(sequences):
    options: dict[str, Any] = {"num_sequences": 6, "micro_batch_size": 3, "other": 2}
    moved, positions = moved_by_batch_shape(Peaked(), sequences, SAMPLERS[3], **options)
    assert (moved, positions) == (0, 6 * SEQ_LEN)
    moved, positions = moved_by_batch_shape(Moody(), sequences, SAMPLERS[3], **options)
    assert 0 < moved <= positions


def test_a_broken_teacher_is_an_error(sequences):
    class Broken(Peaked):
        def logits(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().logits(tokens).fill_(float("nan"))

    with pytest.raises(TeacherError):
        study_estimators(Broken(), sequences, SAMPLERS, num_sequences=2, micro_batch_size=2)
