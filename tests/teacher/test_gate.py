"""The gate stops teachers that cannot be sound within 1,000 sequences, and lets every sound one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from distill_pretrain.contracts import IGNORED_LABEL
from distill_pretrain.errors import TeacherError
from distill_pretrain.sampling.samplers import Sampler, sample_sets
from distill_pretrain.teacher.gate import BatchFigures, SanityGate
from distill_pretrain.teacher.scoring import SampledBatch
from tests.support.notices import noted

SEQ_LEN, BATCH = 64, 8
Logits = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]]
"""tokens int64[T] of a sequence -> logits [T, V]."""


class Text:
    """A first-order Markov chain: with probability `sure` a token's fixed successor, else a token by Zipf's law.

    Args:
        vocab: V.
        sure: see above.
        runs: probability that a token is repeated instead.
        seed: of the text.
    """

    def __init__(self, vocab: int, sure: float, runs: float = 0.0, seed: int = 0) -> None:
        self.vocab, self.sure, self.runs = vocab, sure, runs
        self.rng = np.random.default_rng(seed)
        self.successor = self.rng.permutation(vocab)
        common = 1 / np.arange(1, vocab + 1)
        self.common = common / common.sum()

    def sequence(self, length: int) -> npt.NDArray[np.int64]:
        random = self.rng.choice(self.vocab, length, p=self.common)
        chance = self.rng.random(length)
        tokens = random.copy()
        for t in range(1, length):
            if chance[t] < self.runs:
                tokens[t] = tokens[t - 1]
            elif chance[t] < self.runs + (1 - self.runs) * self.sure:
                tokens[t] = self.successor[tokens[t - 1]]
        return tokens

    def teacher(self, learned: float = 1.0) -> Logits:
        """The chain itself, mixed with its mean: 1 knows it all, 0 knows frequencies alone."""

        def logits(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
            rows = np.arange(len(tokens))
            probs = np.tile((1 - self.runs) * (1 - self.sure) * self.common, (len(tokens), 1))
            probs[rows, self.successor[tokens]] += (1 - self.runs) * self.sure
            probs[rows, tokens] += self.runs
            return np.log(np.maximum(learned * probs + (1 - learned) * self.common, 1e-30)).astype(
                np.float32
            )

        return logits


def run_gate(
    text: Text,
    logits: Logits,
    *,
    num_sequences: int = 1000,
    sampler: str = "systematic",
    num_draws: int = 50,
    mode: Any = "refuse",
    seq_len: int = SEQ_LEN,
    later: Logits | None = None,
) -> BatchFigures:
    """Show sequences to a gate; after 300 of them the teacher is `later`."""
    gate = SanityGate(vocab_size=text.vocab, mode=mode)
    chosen = Sampler(
        name=sampler, num_draws=num_draws, seed=1, top_p=0.8 if sampler == "topp" else None
    )
    figures = BatchFigures(positions=0, hits=0, entropy=0)
    for first in range(0, num_sequences, BATCH):
        teacher = later if later is not None and first >= 300 else logits
        stream = np.stack([text.sequence(seq_len + 1) for _ in range(BATCH)])
        labels = stream[:, 1:].astype(np.int32)
        labels[0, -3:] = IGNORED_LABEL
        rows = np.concatenate([teacher(tokens) for tokens in stream[:, :-1]])
        positions = np.arange(len(rows), dtype=np.uint64) + np.uint64(first * seq_len)
        sets = sample_sets(rows, positions, [chosen], valid=labels.reshape(-1) != IGNORED_LABEL)
        batch = SampledBatch(
            first=first,
            tokens=stream[:, :-1].astype(np.int32),
            sets=sets,
            entropy=mean_entropy(rows),
        )
        figures = gate.look(batch, 0, labels)
    return figures


def mean_entropy(logits: npt.NDArray[np.float32]) -> float:
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    return float(-(probs * np.log(np.maximum(probs, 1e-30))).sum(axis=1).mean())


def constant(row: npt.NDArray[np.float64]) -> Logits:
    return lambda tokens: np.tile(row.astype(np.float32), (len(tokens), 1))


def one_hot(vocab: int, token: int) -> npt.NDArray[np.float64]:
    row = np.zeros(vocab)
    row[token] = 30
    return row


def shifted(teacher: Logits, by: int) -> Logits:
    return lambda tokens: np.roll(teacher(tokens), by, axis=0)


def renamed(teacher: Logits, vocab: int) -> Logits:
    """The teacher of another tokenizer: its ids mean something else."""
    other = np.random.default_rng(9).permutation(vocab)
    return lambda tokens: teacher(other[tokens])[:, np.argsort(other)[::-1]]


def random_weights(vocab: int) -> Logits:
    """Logits as a model initialised at random makes them: of a spread of 1.6, and others after every token."""
    table = 1.6 * np.random.default_rng(2).standard_normal((vocab, vocab)).astype(np.float32)
    return lambda tokens: table[tokens]


TEXTS = {"bytes": (200, 0.5), "words": (600, 0.4)}
FAULTS: dict[str, Callable[[Text], Logits]] = {
    "uniform": lambda text: constant(np.zeros(text.vocab)),
    "frequencies": lambda text: constant(np.log(text.common)),
    "random but constant": lambda text: constant(
        3 * np.random.default_rng(1).standard_normal(text.vocab)
    ),
    "always the commonest": lambda text: constant(one_hot(text.vocab, 0)),
    "always a rare one": lambda text: constant(one_hot(text.vocab, text.vocab - 1)),
    "one place early": lambda text: shifted(text.teacher(), 1),
    "one place late": lambda text: shifted(text.teacher(), -1),
    "other ids": lambda text: renamed(text.teacher(), text.vocab),
    "random weights": lambda text: random_weights(text.vocab),
    "untrained": lambda text: (
        lambda tokens: (
            0.02 * np.random.default_rng(tokens[0]).standard_normal((len(tokens), text.vocab))
        ).astype(np.float32)
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_faulty_teacher_is_stopped_within_a_thousand_sequences(text, fault):
    made = Text(*TEXTS[text])
    with pytest.raises(TeacherError, match=r"sequences 0 to \d+; found: .*expected.*remedy"):
        run_gate(made, FAULTS[fault](made))


@pytest.mark.parametrize(
    ("sampler", "num_draws"), [("multinomial", 20), ("systematic", 12), ("topk", 5), ("topp", 40)]
)
@pytest.mark.parametrize("fault", ["frequencies", "always the commonest", "one place early"])
def test_faults_show_in_every_kind_of_target(sampler, num_draws, fault):
    made = Text(200, 0.5)
    with pytest.raises(TeacherError):
        run_gate(made, FAULTS[fault](made), sampler=sampler, num_draws=num_draws)


def test_each_fault_has_its_name():
    made = Text(200, 0.5)
    for fault, name in {
        "uniform": "uniform",
        "frequencies": "do not depend on the text",
        "one place early": "predicts the token before",
        "one place late": "predicts the token after",
        "always a rare one": "do not depend on the text",
    }.items():
        with pytest.raises(TeacherError, match=name):
            run_gate(made, FAULTS[fault](made))


SOUND: dict[str, tuple[Text, float]] = {
    "bytes": (Text(200, 0.5), 1.0),
    "a weak teacher": (Text(512, 0.3), 0.1),
    "a very weak teacher of many words": (Text(600, 0.3), 0.05),
    "words": (Text(600, 0.4), 1.0),
    "long runs": (Text(300, 0.3, runs=0.95), 1.0),
    "near-deterministic text": (Text(500, 0.9999), 1.0),
    "two tokens": (Text(2, 0.2), 1.0),
    "nothing but one token": (Text(50, 0.5, runs=1.0), 1.0),
}


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("num_draws", [50, 1])
def test_a_sound_teacher_passes(name, num_draws):
    text, learned = SOUND[name]
    figures = run_gate(text, text.teacher(learned), num_sequences=256, num_draws=num_draws)
    assert figures.positions > 400


def test_a_teacher_that_freezes_later_is_stopped():
    text = Text(200, 0.5)
    with pytest.raises(TeacherError, match="do not depend") as caught:
        run_gate(text, text.teacher(), later=constant(np.log(text.common)), num_sequences=1000)
    first, last = map(int, str(caught.value).split("sequences ")[1].split(";")[0].split(" to "))
    assert first >= 250 and last < 1000


def test_a_warning_is_said_once_and_off_says_nothing():
    text = Text(200, 0.5)
    with noted() as said:
        run_gate(text, constant(np.zeros(200)), mode="warn")
        assert len(said) == 1
        assert said[0].startswith("WARNING: the teacher's distribution is uniform")
        run_gate(text, constant(np.zeros(200)), mode="off")
    assert len(said) == 1
