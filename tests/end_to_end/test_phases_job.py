"""Runs of several phases through the command line: killed anywhere they go on; what cannot change is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_pretrain import Callback, train_student
from distill_pretrain.checkpoint.store import find_checkpoint
from distill_pretrain.cli.main import main
from distill_pretrain.reports.curves import TrainingCurve
from tests.support.distributed import _processes
from tests.support.jobs import Job, run_cli

TERMS = ("loss", "ce", "grad_norm", "lr")
STEPS = {"short": 4, "long": 3, "decay": 4}
PHASES: list[dict[str, Any]] = [
    {"name": "short", "train": {"steps": 4}},
    {
        "name": "long",
        "data": {"seq_len": 128, "num_sequences": 20},
        "model": {"rotary_base": 50000},
        "optimizer": {"lr": 2e-3, "warmup_steps": 1},
        "train": {"steps": 3, "global_batch_size": 4, "micro_batch_size": 2},
    },
    {
        "name": "decay",
        "optimizer": {"decay_style": "linear", "min_lr": 1e-4, "warmup_steps": 0},
        "train": {"steps": 4},
    },
]
SETTINGS = ("model.dropout=0.1", "train.checkpoint_interval=2")


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[list[float]]:
    return [[record[term] for term in TERMS] for record in records(run)]


def curves(run: Path) -> dict[str, list[list[float]]]:
    return {name: curve(run / name) for name in STEPS}


def arguments(run: Path, phases: list[dict[str, Any]] = PHASES, *more: str) -> list[str]:
    text = yaml.safe_dump(phases, default_flow_style=True, width=10**6).strip()
    return [f"train.output_dir={run}", f"phases={text}", *SETTINGS, *more]


def changed(number: int, **sections: dict[str, Any]) -> list[dict[str, Any]]:
    """The phases, with other settings of one."""
    phases: list[dict[str, Any]] = json.loads(json.dumps(PHASES))
    for section, keys in sections.items():
        phases[number][section] = {**phases[number].get(section, {}), **keys}
    return phases


class Visited(Callback):
    """The sequences that every step trains on."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []

    def before_step(self, step: int) -> None:
        batches = self.trainer.batches
        numbers = range(batches.num_micro_batches)
        self.steps.append([int(n) for b in numbers for n in batches.sequences(step - 1, b)[1]])


class Killed(Callback):
    """kill -9 before a step of a phase."""

    def __init__(self, phase: str, step: int) -> None:
        self.phase, self.step = phase, step

    def before_step(self, step: int) -> None:
        if self.trainer.config.output_dir.name == self.phase and step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until(recipe: str, overrides: list[str], phase: str, step: int) -> None:
    train_student(recipe, overrides, callbacks=[Killed(phase, step)])


def kill(job: Job, run: Path, phase: str, step: int) -> None:
    process = _processes().Process(
        target=train_until, args=(str(job.recipe), arguments(run), phase, step)
    )
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def unbroken(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("phases") / "run"
    job.cli("train", *arguments(run))
    return run


def test_a_run_that_is_killed_in_every_phase_is_the_unbroken_one(job, unbroken, tmp_path, capsys):
    run = tmp_path / "run"
    # Within a phase, at the seam of two, and behind the first checkpoint of the last.
    for phase, step in (("short", 4), ("long", 1), ("long", 3), ("decay", 4)):
        kill(job, run, phase, step)
        assert len(records(run / phase)) == step - 1
    assert TrainingCurve.load(run)["step"].tolist() == list(range(1, 11))
    job.cli("train", *arguments(run))
    assert curves(run) == curves(unbroken)
    assert [len(part) for part in curves(run).values()] == list(STEPS.values())
    capsys.readouterr()
    job.cli("train", *arguments(run))
    assert capsys.readouterr().err.count("already trained") == 3


def test_a_ramp_of_the_batch_visits_the_text_as_one_batch_does(job, tmp_path):
    ramp = [
        {"name": f"of-{size}", "train": {"steps": 2, "global_batch_size": size}}
        for size in (2, 4, 8)
    ]
    ramp[0]["train"]["micro_batch_size"] = 2
    visited: dict[str, list[list[int]]] = {}
    for name, more in (
        ("ramp", [f"phases={json.dumps(ramp)}"]),
        ("one", ["train.steps=14", "train.global_batch_size=2", "train.micro_batch_size=2"]),
    ):
        seen = Visited()
        overrides = [f"train.output_dir={tmp_path / name}", *more]
        train_student(job.recipe, overrides, callbacks=[seen])
        visited[name] = seen.steps
    assert [len(step) for step in visited["ramp"]] == [2, 2, 4, 4, 8, 8]
    assert [*chain(*visited["ramp"])] == [*chain(*visited["one"])]
    tokens = [
        record["tokens"]
        for name in ("of-2", "of-4", "of-8")
        for record in records(tmp_path / "ramp" / name)
    ]
    assert tokens == [64 * n for n in (2, 4, 4, 8, 8, 16)]


def test_the_lineage_is_told(job, unbroken, tmp_path, capsys):
    checkpoint = find_checkpoint(unbroken)
    assert checkpoint.folder == unbroken / "decay" / "checkpoints" / "step-00000004"
    start = checkpoint.identity["start_from"]
    assert start["path"].endswith("long/checkpoints/step-00000003") and start["step"] == 3
    assert start["sha256"] == find_checkpoint(unbroken / "long").sha256
    # The text of the phase before goes on, that of another length began.
    assert (start["optimizer"], start["first_sequence"]) == ("kept", 3 * 4)
    (earlier,) = start["earlier"]
    assert earlier["path"].endswith("short/checkpoints/step-00000004")
    assert (earlier["optimizer"], earlier["first_sequence"]) == ("kept", 0)
    events = map(json.loads, (unbroken / "long" / "events.jsonl").read_text().splitlines())
    (seam,) = (event for event in events if event["event"] == "phase")
    assert seam["path"] == earlier["path"] and seam["optimizer"] == "kept"

    joined = TrainingCurve.load(unbroken)
    assert joined["step"].tolist() == list(range(1, 12))
    assert joined["loss"].tolist() == [r[0] for part in curves(unbroken).values() for r in part]
    tokens = 4 * 8 * 64 + 3 * 4 * 128
    assert joined["tokens"][6] == tokens and joined["tokens"][7] == tokens + 4 * 128
    run_cli("report", str(unbroken))
    page = (unbroken / "run.html").read_text()
    assert "step 4: phase (path" in page and "step 7: phase (path" in page
    capsys.readouterr()
    run_cli("inspect", str(unbroken))
    told = capsys.readouterr().out
    assert "of 3 phases" in told and "optimizer kept" in told and "rotary_base 50000" in told
    run_cli("export", str(unbroken), str(tmp_path / "hf"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "50000" in json.dumps(config)


def test_a_decay_that_branches_off_equals_the_run_that_decayed_at_once(job, tmp_path):
    at_once, trunk, branch = (tmp_path / name for name in ("at once", "trunk", "branch"))
    decay = ("optimizer.min_lr=1e-4", "optimizer.wsd_decay_steps=4", "optimizer.decay_style=wsd")
    job.cli("train", f"train.output_dir={at_once}", "train.steps=8", *decay, *SETTINGS)
    trunk_settings = (*decay, "optimizer.decay_steps=90", "train.keep_checkpoints=9")
    job.cli("train", f"train.output_dir={trunk}", "train.steps=6", *trunk_settings, *SETTINGS)
    job.cli(
        "train",
        f"train.output_dir={branch}",
        f"train.continue_from={trunk / 'checkpoints' / 'step-00000004'}",
        "train.steps=4",
        "optimizer.min_lr=1e-4",
        "optimizer.decay_style=linear",
        "optimizer.warmup_steps=0",
        *SETTINGS,
    )
    assert curve(branch) == curve(at_once)[4:]


def test_a_fresh_optimizer_is_that_of_a_run_that_starts_from_the_weights(job, unbroken, tmp_path):
    last = unbroken / "short" / "checkpoints" / "step-00000004"
    more = ("train.steps=2", "optimizer.warmup_steps=0", "model.dropout=0", "data.seed=5")
    for name, start in (
        ("fresh", (f"train.continue_from={last}", "train.fresh_optimizer=true")),
        ("weights", (f"train.start_from={last}",)),
        ("kept", (f"train.continue_from={last}",)),
    ):
        job.cli("train", f"train.output_dir={tmp_path / name}", *start, *more)
    assert curve(tmp_path / "fresh") == curve(tmp_path / "weights")
    first, second = curve(tmp_path / "kept")
    assert first == curve(tmp_path / "fresh")[0] and second != curve(tmp_path / "fresh")[1]
    # What a run started with, it goes on with.
    again = (f"train.output_dir={tmp_path / 'kept'}", *more, "train.steps=3")
    for start, said in (
        ((f"train.continue_from={last}", "train.fresh_optimizer=true"), "optimizer fresh"),
        ((f"train.start_from={last}",), "train.continue_from: checkpoint"),
        ((), "this run nothing"),
    ):
        assert f"{said}" in failure(job, *again, *start)


def failure(job: Job, *arguments: str, dry: bool = False) -> str:
    """What a refused job says."""
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as error:
        status = main(["train", str(job.recipe), *arguments, *(["--dry-run"] if dry else [])])
    assert status == 2 and "Traceback" not in error.getvalue()
    return error.getvalue()


@pytest.mark.parametrize(
    ("number", "sections", "said"),
    [
        (1, {"model": {"hidden_size": 64}}, "model.hidden_size: 32 before, 64 in the phase"),
        (2, {"model": {"init": "xavier"}}, "model.init: megatron before, xavier in the phase"),
        (2, {"data": {"vocab_size": 600}}, "data.vocab_size"),
        (1, {"train": {"precision": "bf16"}}, "train.precision: fp32 before, bf16 in the phase"),
        (2, {"optimizer": {"decay_embeddings": False}}, "optimizer.decay_embeddings: True before"),
        (2, {"train": {"stepz": 9}}, "train.stepz: unknown key"),
        (2, {"train": {"steps": "many"}}, "train.steps"),
        (1, {"train": {"output_dir": "x"}}, "train.output_dir"),
        (1, {"train": {"start_from": "teacher"}}, "train.start_from"),
        (2, {"train": {"fresh_optimizer": 3}}, "train.fresh_optimizer"),
    ],
)
def test_a_phase_that_cannot_be_is_refused_before_the_first(job, tmp_path, number, sections, said):
    phases = changed(number, **sections)
    if "vocab_size" in said:
        phases[0]["data"] = {"vocab_size": 512}
    for dry in (False, True):
        error = failure(job, *arguments(tmp_path / "run", phases), dry=dry)
        assert said in error and f"phases[{number}] ({PHASES[number]['name']})" in error
    assert not (tmp_path / "run").exists()


def test_state_that_does_not_fit_may_be_left_behind(job, tmp_path):
    phases = changed(1, train={"precision": "bf16", "fresh_optimizer": True})
    job.cli("train", *arguments(tmp_path / "run", phases, "model.dropout=0"))
    starts = [
        find_checkpoint(tmp_path / "run" / n).identity["start_from"] for n in ("long", "decay")
    ]
    assert [start["optimizer"] for start in starts] == ["fresh", "kept"]


def test_another_tokenizer_is_refused(job, tmp_path, unbroken):
    other = tmp_path / "other"
    shutil.copytree(job.tokens, other)
    record = json.loads((other / "tokens.json").read_text())
    record["tokenizer"]["sha256"] = "0" * 64
    (other / "tokens.json").write_text(json.dumps(record))
    phases = changed(1, data={"tokens": str(other / "train"), "held_out_tokens": None})
    assert "tokenizer of data.tokens" in failure(job, *arguments(tmp_path / "run", phases))
    alone = [f"train.output_dir={tmp_path / 'alone'}", f"data.tokens={other / 'train'}"]
    start = f"train.continue_from={unbroken / 'short'}"
    assert "tokenizer of data.tokens" in failure(job, *alone, "data.held_out_tokens=null", start)


def test_what_has_been_done_stays_what_it_was(job, unbroken, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    job.cli("train", *arguments(run))  # in another place, the same
    longer = failure(job, *arguments(run, changed(0, train={"steps": 6})))
    assert "the next phase has begun, from another step" in longer and "step-00000004" in longer
    other = failure(job, *arguments(run, changed(0, optimizer={"lr": 1.0})))
    assert "belongs to another run" in other and "optimizer.lr" in other
    # Phases that are behind need not be kept.
    run = tmp_path / "own"
    job.cli("train", *arguments(run))
    shutil.rmtree(run / "short" / "checkpoints")
    longer_last = changed(2, optimizer={"decay_style": "constant"}, train={"steps": 5})
    assert "optimizer.decay_style" in failure(job, *arguments(run, longer_last))
    shutil.rmtree(run / "decay")
    job.cli("train", *arguments(run))
    assert curves(run) == curves(unbroken)
    assert not (run / "short" / "checkpoints").exists()


def test_files_of_a_phase_that_is_behind_are_not_read_again_those_of_the_last_are(
    job, unbroken, tmp_path, capsys
):
    run = tmp_path / "run"
    job.cli("train", *arguments(run))
    capsys.readouterr()
    for name in ("short", "decay"):
        newest = find_checkpoint(run / name)
        largest = max(newest.files, key=lambda file: (newest.folder / file).stat().st_size)
        content = bytearray((newest.folder / largest).read_bytes())
        content[len(content) // 2] ^= 1
        (newest.folder / largest).write_bytes(content)
    job.cli("train", *arguments(run))
    found = capsys.readouterr().err
    assert found.count("already trained") == 2 and "set aside as step-00000004.bad" in found
    assert not list((run / "short" / "checkpoints").glob("*.bad"))
    assert curves(run) == curves(unbroken)


def test_phases_of_several_layouts_are_those_of_one_process(job, tmp_path):
    phases = changed(1, parallel={"tensor": 2}, train={"micro_batch_size": 4})
    phases[2] = {**phases[2], "parallel": {"tensor": 1, "pipeline": 2}}
    two, one = tmp_path / "two", tmp_path / "one"
    job.run("train", *arguments(two, phases, "model.dropout=0"), num_processes=2)
    job.cli("train", *arguments(one, PHASES, "model.dropout=0"))
    for name in STEPS:
        for step, expected in zip(curve(two / name), curve(one / name), strict=True):
            assert step == pytest.approx(expected, rel=1e-4)


def test_a_phase_whose_teacher_is_missing_is_refused_before_the_first(job, tmp_path):
    phases = changed(2, objective={"target": "teacher", "kd_weight": 1.0})
    for dry in (False, True):
        error = failure(job, *arguments(tmp_path / "run", phases, "teacher=null"), dry=dry)
        assert "no teacher" in error
    assert not (tmp_path / "run").exists()


def test_two_phases_of_one_name_and_two_starts_are_refused(job, tmp_path):
    twice = [PHASES[0], {**PHASES[1], "name": "short"}]
    assert "two phases of one name" in failure(job, *arguments(tmp_path / "run", twice))
    both = (f"train.output_dir={tmp_path}", "train.start_from=a", "train.continue_from=b")
    assert "a run has one of the two" in failure(job, *both)
    assert "no checkpoint found" in failure(job, both[0], both[2])
