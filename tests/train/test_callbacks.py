"""Callbacks are told of every moment in a fixed order; a user's own one has a say in a training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from distill_pretrain import Callback, train_student
from distill_pretrain.checkpoint.store import CheckpointStore
from distill_pretrain.errors import CheckpointError, ConfigError
from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.processes.process import process_group, released_groups
from distill_pretrain.train.callbacks import Judgement, Verdict
from distill_pretrain.train.config import BadStepsConfig
from tests.support.layouts import LLAMA
from tests.support.notices import noted
from tests.support.small_corpus import NUM_SEQUENCES, SEQ_LEN, VOCAB_SIZE, write_small_corpus
from tests.support.training import Fault, run_trainer


class Diary(Callback):
    """Every moment, as a word and a step, in one list for several callbacks."""

    def __init__(self, name: str, lines: list[str]) -> None:
        self.name, self.lines = name, lines

    def note(self, what: str) -> None:
        self.lines.append(f"{self.name} {what}")

    def load_state_dict(self, state: Any) -> None:
        self.note(f"load {state[self.name]}")

    def begin(self, step: int) -> None:
        self.note(f"begin {step}")

    def before_step(self, step: int) -> None:
        self.note(f"before {step}")

    def figures(self) -> dict[str, float]:
        self.note("figures")
        return {self.name: 7.0}

    def judge(self, step: int, seen: Any) -> Judgement:
        self.note(f"judge {step}")
        assert self.trainer.most[self.name] == 7.0
        return Judgement()

    def after_step(self, step: int, doing: Any) -> dict[str, Any]:
        self.note(f"after {step}")
        return {self.name: step}

    def end_step(self, step: int, record: Any, doing: Any) -> None:
        assert record["a"] == record["b"] == step == record["step"]
        self.note(f"ended {step}")

    def before_save(self, step: int) -> None:
        self.note(f"before save {step}")

    def state_dict(self) -> dict[str, Any]:
        self.note("state")
        return {self.name: len(self.lines)}

    def settle(self, doing: Any) -> None:
        self.note("settle")

    def end(self) -> None:
        self.note("end")


def test_moments_come_in_order_also_over_a_rollback(tmp_path, monkeypatch):
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    lines: list[str] = []
    begin_save = CheckpointStore.begin_save

    def with_its_record(self: Any, step: int, *arguments: Any, **settings: Any) -> Any:
        assert [r["step"] for r in records(tmp_path)] == list(range(1, step + 1))
        return begin_save(self, step, *arguments, **settings)

    monkeypatch.setattr(CheckpointStore, "begin_save", with_its_record)
    with process_group(), released_groups(), model_parallel(ParallelConfig(), seed=1) as groups:
        run = run_trainer(
            tmp_path,
            groups,
            model={**LLAMA, "num_layers": 1},
            parallel=ParallelConfig(),
            fault=Fault(at=2, factor=math.nan),
            callbacks=lambda student: [Diary("a", lines), Diary("b", lines)],
            steps=2,
            checkpoint_interval=1,
            bad_steps=BadStepsConfig(nonfinite="rollback"),
        )
    assert run.error is None
    alone = [line.removeprefix("a ") for line in lines if line.startswith("a ")]
    step = ["before {0}", "figures", "judge {0}", "after {0}", "ended {0}", "before save {0}"]
    assert alone == [
        "begin 0",
        *(word.format(1) for word in step),
        "state",
        "before 2",
        "figures",
        "judge 2",
        "settle",  # the guard, which judges last, has found the NaN
        "load 15",
        "begin 1",
        *(word.format(2) for word in step),
        "state",
        "settle",
        "end",
    ]
    # Each moment reaches the callbacks in their order, before the next moment comes.
    assert [line[2:] for line in lines[::2]] == alone
    assert [line[:1] for line in lines] == ["a", "b"] * len(alone)
    (saved,) = [c for c in run.checkpoints.complete() if c.name.endswith("1")]
    progress = json.loads((saved / "checkpoint.json").read_text())["progress"]
    assert sorted(progress) == ["a", "b", "passed_over", "recent_losses"]


def test_a_failure_ends_every_callback_and_settles_none(tmp_path):
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    class Breaks(Diary):
        def after_step(self, step: int, doing: Any) -> dict[str, Any]:
            raise ZeroDivisionError

        def end(self) -> None:
            super().end()
            raise OSError("and again")

    lines: list[str] = []
    with (
        process_group(),
        released_groups(),
        model_parallel(ParallelConfig(), seed=1) as groups,
        pytest.raises(OSError, match="and again") as caught,
    ):
        run_trainer(
            tmp_path,
            groups,
            model={**LLAMA, "num_layers": 1},
            parallel=ParallelConfig(),
            callbacks=lambda student: [Breaks("a", lines), Diary("b", lines)],
            steps=1,
        )
    assert isinstance(caught.value.__context__, ZeroDivisionError)
    assert lines[-2:] == ["a end", "b end"] and "a settle" not in lines


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tokens = write_small_corpus(tmp_path_factory.mktemp("tokens") / "train")
    return {
        "data": {
            "tokens": tokens,
            "seq_len": SEQ_LEN,
            "vocab_size": VOCAB_SIZE,
            "num_sequences": NUM_SEQUENCES,
        },
        "model": {
            "num_layers": 1,
            "hidden_size": 16,
            "ffn_hidden_size": 32,
            "num_attention_heads": 2,
        },
        "optimizer": {"decay_style": "constant"},
        "train": {"output_dir": tokens, "steps": 4, "global_batch_size": 4, "threads": 1},
    }


def of_run(recipe: dict[str, Any], folder: Path, **settings: Any) -> dict[str, Any]:
    return {**recipe, "train": {**recipe["train"], "output_dir": folder, **settings}}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Picky(Callback):
    """Refuses one step, counts those it has seen over all starts, and tells."""

    def __init__(self, refused: int) -> None:
        self.refused, self.seen = refused, 0

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["picky"]

    def state_dict(self) -> dict[str, Any]:
        return {"picky": self.seen}

    def judge(self, step: int, seen: Any) -> Judgement:
        if step == self.refused:
            return Judgement(Verdict.SKIP, "I do not like it")
        return Judgement()

    def after_step(self, step: int, doing: Any) -> dict[str, Any]:
        self.seen += 1
        return {
            "picky": self.seen,
            "weights": len(list(self.trainer.student.chunks[0].parameters())),
        }


class Other(Picky):
    """Has changed its key since."""

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["other"]


def test_a_callback_of_the_user_judges_reports_and_goes_on_after_a_resume(recipe, tmp_path):
    with noted() as said:
        assert train_student(of_run(recipe, tmp_path / "run", steps=2), callbacks=[Picky(2)])
        assert train_student(of_run(recipe, tmp_path / "run"), callbacks=[Picky(3)])
    found = records(tmp_path / "run")
    assert [r["picky"] for r in found] == [1, 2, 3, 4] and found[0]["weights"] > 3
    assert [r["applied"] for r in found] == [True, False, False, True]
    assert [line for line in said if "bad step" in line] == [
        "WARNING: bad step 2: I do not like it (skip)",
        "WARNING: bad step 3: I do not like it (skip)",
    ]
    # The user's callbacks judge first: what they refuse is no loss of an applied step to the guard.
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    progress = json.loads((newest / "checkpoint.json").read_text())["progress"]
    assert len(progress["recent_losses"]) == 2
    # One that does not know its key in the checkpoint is told so before anything is lost.
    longer = of_run(recipe, tmp_path / "run", steps=5)
    with pytest.raises(CheckpointError, match=r"record is damaged.*KeyError: 'other'"):
        train_student(longer, callbacks=[Other(9)])
    assert records(tmp_path / "run") == found


class GoesBack(Callback):
    """Finds one step bad, the first time it comes."""

    def __init__(self, at: int) -> None:
        self.at, self.is_over = at, False

    def judge(self, step: int, seen: Any) -> Judgement:
        if step != self.at or self.is_over:
            return Judgement()
        self.is_over = True
        return Judgement(Verdict.ROLL_BACK, "once more, on other batches")


def test_batches_that_a_rollback_left_out_stay_out_after_a_resume(recipe, tmp_path):
    def losses(name: str, *steps: int) -> list[float]:
        for last, goes_back in zip(steps, (True, False), strict=False):
            run = of_run(recipe, tmp_path / name, steps=last, checkpoint_interval=1)
            assert train_student(run, callbacks=[GoesBack(2)] if goes_back else [])
        return [r["loss"] for r in records(tmp_path / name)]

    assert losses("cut", 3, 4) == losses("whole", 4)


def test_a_callback_that_does_nothing_changes_no_bit(recipe, tmp_path):
    assert train_student(of_run(recipe, tmp_path / "a"))
    assert train_student(of_run(recipe, tmp_path / "b"), callbacks=[Callback(), Callback()])
    keys = ("step", "loss", "ce", "kl", "grad_norm", "lr", "tokens", "applied")
    a, b = ([[r[k] for k in keys] for r in records(tmp_path / x)] for x in "ab")
    assert a == b and list(records(tmp_path / "a")[0]) == list(records(tmp_path / "b")[0])


def test_two_callbacks_with_one_key_are_named_at_the_first_save(recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"Picky\.state_dict; found: picky"):
        train_student(of_run(recipe, tmp_path), callbacks=[Picky(9), Picky(9)])
