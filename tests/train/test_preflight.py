"""What a training job says of its loss and targets before it starts, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.kept_mass import KeptShare
from distill_pretrain.errors import ConfigError, TeacherError
from distill_pretrain.kernels.sparse_kd.launch import source_of
from distill_pretrain.losses import backend
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.losses.sparse_kd import DistillationObjective
from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.processes.process import process_group
from distill_pretrain.train.config import TrainConfig
from distill_pretrain.train.preflight import (
    check_kernels,
    check_positions,
    check_targets,
    check_teacher,
    ignored_caches,
)
from tests.data.test_canary import SEQ_LEN, VOCAB, Sampled, Text
from tests.support.notices import noted


def source(sampler: str, num_draws: int) -> SimpleNamespace:
    """A corpus with a cache of these targets."""
    text = Text()
    cache = Sampled(text, sampler, num_draws)
    cache.plan = SimpleNamespace(
        kind="logprobs" if sampler == "topk" else "counts",
        sampler={"name": sampler, "num_draws": num_draws},
        num_sequences=text.num_sequences,
    )
    cache.manifest = SimpleNamespace(totals={"canary_hit_rate": None})
    return SimpleNamespace(
        config=SimpleNamespace(cache="here/cache", canary="refuse"),
        sequences=SimpleNamespace(plan=text, num_sequences=text.num_sequences),
        cache=cache,
    )


def said(sampler: str, num_draws: int, **objective) -> list[str]:
    config = ObjectiveConfig(kd_weight=1.0, **objective)
    with noted() as lines:
        check_targets([source(sampler, num_draws)], config)
    assert lines.pop(0).startswith("canary of here/cache: ")
    return lines


def kept_by(num_draws: int) -> tuple[float, float]:
    """Mean mass of all positions with targets, and mean of -ln of it."""
    text = Text()
    cache, masses = Sampled(text, "topk", num_draws), []
    for sequence in range(text.num_sequences):
        tokens, _ = text.read(np.array([sequence]))
        targets = cache.read(sequence, tokens[0])
        rows = np.repeat(np.arange(SEQ_LEN), targets.entries_per_token)
        sums = np.bincount(rows, targets.probs(), minlength=SEQ_LEN)
        masses.append(sums[targets.entries_per_token > 0])
    mass = np.concatenate(masses)
    return float(mass.mean()), float(-np.log(mass).mean())


def test_what_a_cut_off_cache_keeps_is_said_at_the_start_and_below_nine_tenths_is_a_warning():
    mass, bias = kept_by(5)
    assert mass < 0.9
    (line,) = said("topk", 5)
    assert line.startswith(
        f"WARNING: here/cache: topk keeps {mass:.1%} of the teacher's mass (mean"
    )
    assert "objective.residual=drop ids that are left out are trained to 0" in line
    assert f"is {bias:.2f} nats off the teacher's distribution" in line and "systematic" in line
    mass, _ = kept_by(VOCAB - 4)
    assert 0.9 < mass < 1
    (line,) = said("topk", VOCAB - 4)
    assert line.startswith(f"here/cache: topk keeps {mass:.1%}") and "WARNING" not in line
    assert said("systematic", 20) == []


@pytest.mark.parametrize(
    ("residual", "words"),
    [
        ("renormalise", "trained to 0"),
        ("label", "goes to the true next token"),
        ("ghost", "the sum alone"),
        ("uniform", "evenly over all ids"),
        ("decoupled", "the sum alone"),
    ],
)
def test_what_becomes_of_the_rest_is_said(residual, words):
    (line,) = said("topk", 5, residual=residual)
    assert f"objective.residual={residual}" in line and words in line


def test_positions_without_a_target_do_not_count():
    share = KeptShare()
    text = Text()
    tokens, _ = text.read(np.array([0]))
    share.add(Sampled(text, "topk", VOCAB).read(0, tokens[0]))
    assert share.positions == SEQ_LEN - 5  # the last five have no label, so no target
    assert share.mean == pytest.approx(1.0, abs=1e-3) and not share.is_low


def test_kernels_that_are_insisted_on_must_take_every_token():
    assert said("topk", 60, kernel="auto")
    with pytest.raises(ConfigError, match=r"objective\.kernel: cuda; found: 513 target entries"):
        said("topk", 513, kernel="cuda")
    with pytest.raises(ConfigError, match=r"objective\.kernel: cuda; found: 513 target entries"):
        said("topk", 512, kernel="cuda", residual="label")


@pytest.mark.parametrize("cap", [None, 30.0])
def test_kernels_that_are_insisted_on_are_those_that_the_loss_launches(cap, monkeypatch):
    tried = []
    monkeypatch.setattr(backend, "loading_problem", lambda source, _: tried.append(source))
    asked = ObjectiveConfig(kd_weight=1.0, kernel="cuda")
    with process_group():
        check_kernels(asked, logit_cap=cap)
    loss = DistillationObjective(asked, vocab_size=VOCAB, tensor_group=None, logit_cap=cap)
    assert tried == [source_of(loss.settings)] * 2


BUCKET = {"residual": "ghost", "divergence": "jensen_shannon"}


@pytest.mark.parametrize("objective", [{"residual": "decoupled"}, BUCKET])
def test_losses_over_kept_ids_refuse_samples(objective):
    assert said("topk", 60, **objective)
    with pytest.raises(ConfigError, match="sampled: which ids a sample keeps is chance"):
        said("systematic", 20, **objective)


def test_positions_are_not_chosen_by_the_entropy_of_a_sample():
    assert said("topk", 60, positions="teacher_entropy")
    assert said("systematic", 20, positions="student_entropy") == []
    with pytest.raises(ConfigError, match=r"systematic; .*objective\.positions=student_entropy"):
        said("systematic", 20, positions="teacher_entropy")


def test_a_share_of_a_sequence_needs_whole_sequences():
    chosen = ObjectiveConfig(kd_weight=1.0, positions="student_entropy")
    check_positions(chosen, ParallelConfig(tensor=2))
    check_positions(ObjectiveConfig(), ParallelConfig(context=2))
    with pytest.raises(ConfigError, match=r"parallel\.context 2"):
        check_positions(chosen, ParallelConfig(context=2))


class Teacher:
    """Logits of which some are -inf, at one position."""

    vocab_size, device = VOCAB, torch.device("cpu")

    def __init__(self, excluded: list[int]) -> None:
        self.excluded = excluded

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, VOCAB)
        logits[:, 3, self.excluded] = -torch.inf
        return logits


def reverse_kl(**more) -> ObjectiveConfig:
    return ObjectiveConfig(target="teacher", kd_weight=1.0, **{"divergence": "reverse_kl"} | more)


def test_reverse_kl_refuses_a_teacher_that_excludes_ids_by_name():
    sequences = SimpleNamespace(plan=Text())
    with pytest.raises(TeacherError, match=r"ids 7, 63; .*objective\.smoothing=0\.001"):
        check_teacher(Teacher([7, 63]), sequences, reverse_kl())
    with pytest.raises(TeacherError, match="ids 0, 1, 2, 3, 4 and 5 more"):
        check_teacher(Teacher(list(range(10))), sequences, reverse_kl())
    with pytest.raises(TeacherError, match="ids 7"):  # at its first step
        check_teacher(Teacher([7]), sequences, reverse_kl(smoothing=[[1, 0.0], [5, 0.1]]))
    check_teacher(Teacher([]), sequences, reverse_kl())
    # The remedies, and a loss of cached targets.
    for remedy in (
        {"smoothing": 0.001},
        {"divergence": "jensen_shannon"},
        {"divergence": "forward_kl"},
    ):
        check_teacher(Teacher([7]), sequences, reverse_kl(**remedy))
    check_teacher(None, sequences, ObjectiveConfig())


def test_caches_that_are_not_read_are_named():
    data = DataConfig(
        tokens=Path("text"),
        seq_len=8,
        cache="first",
        blend=({"tokens": "more", "weight": 1.0, "cache": "second"},),
    )
    train = TrainConfig(output_dir=Path("run"), steps=9, global_batch_size=4)

    def ignored(data: DataConfig, objective: ObjectiveConfig, train: TrainConfig) -> list[str]:
        return list(ignored_caches(data, objective, train))

    assert ignored(data, ObjectiveConfig(), train) == [
        "not read, since objective.kd_weight is 0: first, second (data.cache)"
    ]
    assert "objective.target is teacher: first" in ignored(data, reverse_kl(), train)[0]
    assert ignored(data, ObjectiveConfig(kd_weight=[[1, 0.0], [9, 1.0]]), train) == []
    plain = DataConfig(tokens=Path("text"), seq_len=8, held_out_cache="third")
    assert ignored(plain, ObjectiveConfig(), train) == [
        "not read, since train.eval_interval is not set: third (data.held_out_cache)"
    ]
    evaluated = train.model_copy(update={"eval_interval": 3})
    assert ignored(plain, ObjectiveConfig(), evaluated) == []
