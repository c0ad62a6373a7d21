"""Held-out figures while training, under any layout; the profile of some steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_pretrain.cli.main import main
from distill_pretrain.corpus.sequence_plan import SequencePlan
from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.processes.process import process_group, released_groups
from distill_pretrain.train.config import TrainConfig
from distill_pretrain.train.evaluation import HeldOutEvaluation
from tests.support.distributed import run_distributed
from tests.support.layouts import GLOBAL_BATCH, LLAMA, make_job, take_step
from tests.support.small_corpus import NUM_SEQUENCES, SEQ_LEN, VOCAB_SIZE, write_small_corpus

STEPS = 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2, "sequence_parallel": True},
    "pp2 interleaved": {"pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"context": 2},
    "dp2 overlapped": {
        "distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    "zero3": {},
}


def evaluated(layout: str, parallel: dict[str, Any]) -> dict[str, list[Any]]:
    """The figures after every step, and the steps' own losses; dropout on, so that a lost stream would show."""
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    config = ParallelConfig(**parallel)
    optimizer = {"backend": "deepspeed", "zero_stage": 3} if layout == "zero3" else None
    with released_groups(), model_parallel(config, seed=1) as groups:
        student, batches = make_job(
            LLAMA, config, groups, kd=True, steps=STEPS, optimizer=optimizer
        )
        evaluation = HeldOutEvaluation(
            student=student,
            batches=batches,
            term_names=("loss", "ce", "kl"),
            has_targets=True,
            train=TrainConfig(
                output_dir=Path(), steps=STEPS, global_batch_size=GLOBAL_BATCH, eval_interval=1
            ),
        )
        found: dict[str, list[Any]] = {"losses": [], "figures": []}
        for step in range(STEPS):
            found["losses"].append(take_step(student, batches, step).terms.tolist())
            found["figures"].append(evaluation.after_step(step + 1, lambda what: None))
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, list[Any]]:
    with process_group():
        return evaluated("alone", {})


@pytest.fixture(scope="module")
def split() -> dict[str, Any]:
    pytest.importorskip("deepspeed")
    first, second = run_distributed(on_every_rank, 2)
    assert first == second, "ranks differ"
    return first


def on_every_rank() -> list[dict[str, Any]]:
    import torch.distributed as dist

    with process_group():
        found = {name: evaluated(name, parallel) for name, parallel in LAYOUTS.items()}
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, found)
    return every


@pytest.mark.parametrize("layout", LAYOUTS)
def test_figures_and_training_are_those_of_one_process(alone, split, layout):
    for theirs, ours in zip(alone["figures"], split[layout]["figures"], strict=True):
        assert set(ours) == {"held_out_ce", "held_out_kl"}
        assert ours == pytest.approx(theirs, rel=1e-5)
    for theirs, ours in zip(alone["losses"], split[layout]["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_an_evaluation_finds_what_a_step_finds_and_changes_nothing():
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    def train(*, evaluates: bool) -> tuple[list[Any], list[Any]]:
        steps, scores = [], []
        layout = ParallelConfig()
        with process_group(), model_parallel(layout, seed=1) as groups:
            model = {**LLAMA, "dropout": 0.1 if not evaluates else 0.0}
            student, batches = make_job(model, layout, groups, kd=True, steps=STEPS)
            for step in range(STEPS):
                if evaluates:
                    micro_batches = batches.step_batches(step, with_targets=True)
                    sums, tokens = student.evaluate([iter(micro_batches)])
                    scores.append((sums / tokens).tolist())
                steps.append(take_step(student, batches, step).terms.tolist())
        return steps, scores

    steps, scores = train(evaluates=True)
    # The step reports the loss before its update, on the same batch.
    assert scores == steps


def test_the_figure_is_the_mean_over_all_held_out_tokens(alone):
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    layout = ParallelConfig()
    with process_group(), model_parallel(layout, seed=1) as groups:
        student, batches = make_job(LLAMA, layout, groups, kd=True, steps=STEPS)
        take_step(student, batches, 0)
        number = batches.sources[0].num_sequences // GLOBAL_BATCH
        parts = [
            student.evaluate([iter(batches.step_batches(batch, with_targets=True))])
            for batch in range(number)
        ]
    assert number > 1
    _, ce, kl = (sum(part for part, _ in parts) / sum(n for _, n in parts)).tolist()
    assert alone["figures"][0] == {
        "held_out_ce": pytest.approx(ce),
        "held_out_kl": pytest.approx(kl),
    }


def test_dropout_is_off_while_scoring_and_its_stream_untouched():
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    def train(*, evaluates: bool) -> list[Any]:
        layout = ParallelConfig()
        with process_group(), model_parallel(layout, seed=1) as groups:
            model = {**LLAMA, "dropout": 0.3}
            student, batches = make_job(model, layout, groups, kd=True, steps=STEPS)
            losses = []
            for step in range(STEPS):
                if evaluates:
                    twice = [
                        student.evaluate([iter(batches.step_batches(0, with_targets=True))])
                        for _ in range(2)
                    ]
                    assert twice[0][0].tolist() == twice[1][0].tolist()
                losses.append(take_step(student, batches, step).terms.tolist())
        return losses

    assert train(evaluates=True) == train(evaluates=False)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_corpus(tmp_path_factory.mktemp("tokens") / "train")


def command(tokens: Path, run: Path, *settings: str) -> list[str]:
    return [
        "train",
        f"data={{tokens: {tokens}, held_out_tokens: {tokens}, seq_len: {SEQ_LEN}, num_sequences: {NUM_SEQUENCES}}}",
        f"data.vocab_size={VOCAB_SIZE}",
        "model={num_layers: 1, hidden_size: 16, ffn_hidden_size: 32, num_attention_heads: 2, num_query_groups: 2}",
        f"train={{output_dir: {run}, steps: 5, global_batch_size: 4, threads: 1}}",
        *settings,
    ]


def test_a_run_logs_held_out_figures_and_profiles_its_steps(tokens, tmp_path, capsys):
    run = tmp_path / "run"
    settings = ["train.eval_interval=2", "train.eval_sequences=9", "train.profile=[2,3]"]
    assert main(command(tokens, run, *settings)) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scored = [r["step"] for r in records if "held_out_ce" in r]
    assert scored == [2, 4, 5]
    assert not any("held_out_kl" in r for r in records)
    assert "held out: ce" in capsys.readouterr().err
    with gzip.open(run / "profile/rank-0.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::mm" in names
    assert "aten::mm" in (run / "profile/rank-0.txt").read_text()
    assert main(["report", str(run)]) == 0
    assert "held_out_ce (nats per token)" in (run / "run.html").read_text()
    plain = tmp_path / "plain"
    assert main(command(tokens, plain)) == 0
    lines = (plain / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [r["loss"] for r in records]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.eval_interval=2", "data.held_out_tokens=null"], "data.held_out_tokens"),
        (["train.eval_interval=2", "train.global_batch_size=4096"], "too short to evaluate"),
        (["data.held_out_cache=x", "data.held_out_tokens=null"], "data.held_out_cache"),
        (["train.profile=[3,2]"], "train.profile"),
        (["train.profile=[3,6]"], "from 1 to 5, the last of train.steps"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(tokens, tmp_path, capsys, settings, words):
    for dry in ([], ["--dry-run"]):
        assert main(command(tokens, tmp_path / "run", *settings, *dry)) == 2
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error


def test_a_dry_run_says_what_is_evaluated_and_what_could_not_be_looked_at(tokens, tmp_path, capsys):
    settings = ["train.eval_interval=2", "--dry-run"]
    assert main(command(tokens, tmp_path / "run", *settings)) == 0
    assert "held out              12 sequences every 2 steps" in capsys.readouterr().out
    assert main(command(tokens, tmp_path / "run", "data.held_out_cache=nowhere", *settings)) == 0
    assert "held out              not checked, for want of nowhere" in capsys.readouterr().out
    assert main(command(tokens, tmp_path / "run", "data.held_out_cache=nowhere", "--dry-run")) == 0
    assert "not read, since train.eval_interval is not set: nowhere" in capsys.readouterr().out


def test_held_out_text_of_another_vocabulary_is_refused(tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"some words of text, number {number} of many\n" * 40)
    for size in (300, 310):
        tokenize = [
            "tokenize",
            f"corpus={{paths: [{text}], include: ['*.txt'], output_dir: {tmp_path / str(size)}}}",
            "corpus.workers=1",
            "corpus.held_out_fraction=0.5",
            f"tokenizer.vocab_size={size}",
        ]
        assert main(tokenize) == 0
    settings = ["data.vocab_size=null", "data.num_sequences=null", "train.eval_interval=2"]
    settings += [f"data.tokens={tmp_path / '300/train'}"]
    settings += [f"data.held_out_tokens={tmp_path / '310/held_out'}"]
    capsys.readouterr()
    assert main(command(tmp_path / "none", tmp_path / "run", *settings)) == 2
    error = capsys.readouterr().err
    assert "training text and held-out text differ in vocabulary" in error
    assert "data.held_out_tokens" in error


@pytest.fixture(scope="module")
def teacher_and_cache(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher, and a cache of the first eight sequences of twelve."""
    folder = tmp_path_factory.mktemp("teacher")
    assert main(command(tokens, folder / "run")) == 0
    capture = [
        "capture",
        f"data={{tokens: {tokens}, seq_len: {SEQ_LEN}}}",
        f"data.vocab_size={VOCAB_SIZE}",
        f"teacher.path={folder / 'run'}",
        f"capture={{output_dir: {folder / 'cache'}, num_sequences: 8, sanity_gate: 'off'}}",
    ]
    assert main(capture) == 0
    return folder / "run", folder / "cache"


@pytest.mark.parametrize("learns", ["text", "cache", "teacher"])
@pytest.mark.parametrize("has_cache", [True, False])
def test_the_divergence_is_scored_where_there_is_something_to_diverge_from(
    tokens, teacher_and_cache, tmp_path, learns, has_cache
):
    teacher, cache = teacher_and_cache
    settings = {
        "text": [],
        "cache": [f"data.cache={cache}", "data.num_sequences=8", "objective.kd_weight=1.0"],
        "teacher": [
            "objective.target=teacher",
            f"teacher.path={teacher}",
            "objective.kd_weight=1.0",
        ],
    }[learns]
    settings += ["train.seed=7", "train.eval_interval=5", "train.eval_sequences=8"]
    settings += [f"data.held_out_cache={cache}"] * has_cache
    assert main(command(tokens, tmp_path / "run", *settings)) == 0
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    # Twice the text's entropy at most; a divergence of targets that were not read would be 0.
    assert 1 < last["held_out_ce"] < 2 * np.log(VOCAB_SIZE)
    if has_cache or learns == "teacher":
        assert 1e-4 < last["held_out_kl"] < 5
    else:
        assert "held_out_kl" not in last


def test_a_held_out_cache_that_does_not_fit_is_named_by_its_key(
    tokens, teacher_and_cache, tmp_path, capsys
):
    _, cache = teacher_and_cache
    settings = ["train.eval_interval=5", f"data.held_out_cache={cache}"]
    assert main(command(tokens, tmp_path / "run", *settings, "train.eval_sequences=12")) == 2
    assert (
        f"data.held_out_cache: {cache}; found: 8; expected: at least 12" in capsys.readouterr().err
    )
    assert main(command(tokens, tmp_path / "run", *settings, "data.seed=5")) == 2
    error = capsys.readouterr().err
    assert "not captured on data.held_out_tokens" in error and "data.held_out_cache" in error


def test_a_dry_run_plans_each_corpus_once(tokens, tmp_path, monkeypatch):
    planned = []
    init = SequencePlan.__init__

    def counted(self, index, **settings):
        planned.append(index)
        init(self, index, **settings)

    monkeypatch.setattr(SequencePlan, "__init__", counted)
    settings = ["train.eval_interval=2", "data.num_sequences=null", "--dry-run"]
    assert main(command(tokens, tmp_path / "run", *settings)) == 0
    assert len(planned) == 2  # the corpus and the held-out text
