"""`distill-pretrain eval`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_pretrain.cli.console import progress, say
from distill_pretrain.cli.recipe import Recipe
from distill_pretrain.cli.teachers import load_teacher
from distill_pretrain.config import dump_recipe, require
from distill_pretrain.errors import ConfigError
from distill_pretrain.processes.env import launch_rank, launch_world_size

if TYPE_CHECKING:
    import torch

    from distill_pretrain.cache.reader import CacheReader
    from distill_pretrain.contracts import LogitsEngine
    from distill_pretrain.data.sources import SequenceData
    from distill_pretrain.eval.metrics import ModelScores
    from distill_pretrain.reports.results import EvalResults

SECTIONS = ("data", "eval", "teacher")

HELP = """
Scores trained models on held-out text: cross-entropy, perplexity, top-1 accuracy and its calibration; with a teacher
also KL(teacher || model) over the whole vocabulary, how often both find the same token likeliest, and how many of the
model's drafts the teacher would accept in speculative decoding.

Reads   data.held_out_tokens (.bin/.idx), eval.models (run or checkpoint folders), teacher.path if there is a teacher
Writes  eval.output (JSON), and eval.output.recipe.yaml: the settings that made it

The teacher is scored too, under the name `teacher`. Under torchrun the sequences are divided
among the processes; the figures are the same. Figures that eval.output already holds for the same models on the same
sequences are kept.

On request also:
  eval.cache      scores against a cache of the held-out text, without the teacher; make it with
                  `distill-pretrain capture recipe.yaml data.tokens=HELD_OUT data.cache=null capture.output_dir=...`.
                  cross_entropy_cache estimates the teacher's CE without bias where targets are sampled; kl_cache is
                  too high by one amount for all models, since the entropy of a sample is below the teacher's
  eval.gradients  angle and size of the gradient under cached targets, against that under the teacher's whole
                  distribution, over more and more micro-batches of data.tokens
  eval.tasks      zero-shot tasks of lm-evaluation-harness (pip install 'distill-pretrain[tasks]')

Example
  distill-pretrain eval recipe.yaml
  torchrun --nproc-per-node=2 -m distill_pretrain eval recipe.yaml

  with recipe.yaml:
    data: {tokens: runs/tokens/train, held_out_tokens: runs/tokens/held_out, seq_len: 256}
    teacher: {path: runs/teacher}
    eval:
      models: {ce: runs/ce, kd: runs/kd}
      output: runs/eval.json
      gradients: {model: runs/ce, caches: {systematic: runs/cache, top12: runs/cache_top12}}
      tasks: [piqa, my_tasks/colours.yaml]
"""


def run(recipe: Recipe, args: argparse.Namespace) -> None:
    """Scores the models of a recipe."""
    require(recipe, "eval", "data", "eval")
    assert recipe.data and recipe.eval
    if recipe.data.held_out_tokens is None:
        raise ConfigError(
            "there is no held-out text to score on",
            where="data.held_out_tokens",
            expected="prefix of a .bin/.idx pair",
            remedy="`distill-pretrain tokenize` writes one, held_out, beside train",
        )
    models = _models(recipe)
    _check_extras(recipe)
    from distill_pretrain.data.sources import open_sequences
    from distill_pretrain.processes.process import process_group, set_cpu_threads

    set_cpu_threads(0)
    with process_group():
        held_out = open_sequences(recipe.data, recipe.data.held_out_tokens)
        from distill_pretrain.checkpoint.ownership import job_owning
        from distill_pretrain.files.ownership import owner_beside
        from distill_pretrain.mcore.model.config import ParallelConfig
        from distill_pretrain.mcore.runtime.parallel import model_parallel

        output = recipe.eval.output
        with (
            job_owning(
                owner_beside(output), what=output, remedy="wait for it, or set another eval.output"
            ),
            model_parallel(ParallelConfig(), seed=0),
        ):
            results = _score(recipe, models, held_out)
    _print_table(results)
    say("figures are in", recipe.eval.output)


def _models(recipe: Recipe) -> dict[str, Path]:
    """eval.models, less the teacher where it is listed among them."""
    assert recipe.eval
    models = dict(recipe.eval.models)
    if recipe.teacher is None or "teacher" not in models:
        return models
    if models["teacher"].absolute() != recipe.teacher.path.absolute():
        raise ConfigError(
            "the name `teacher` stands for the model in the section teacher",
            where="eval.models.teacher",
            found=models["teacher"],
            expected=f"{recipe.teacher.path}, or another name",
            remedy="rename it",
        )
    del models["teacher"]
    return models


def _check_extras(recipe: Recipe) -> None:
    """Raises before anything is scored if gradients or tasks could not be computed."""
    assert recipe.eval
    if recipe.eval.gradients is not None:
        if recipe.teacher is None:
            raise ConfigError(
                "the gradients are compared with those of the teacher's whole distribution",
                where="eval.gradients",
                found="no section teacher",
                remedy="name the teacher of the caches, or leave eval.gradients out",
            )
        if launch_world_size() > 1:
            raise ConfigError(
                "gradients are compared in one process",
                where="eval.gradients",
                found=f"{launch_world_size()} processes",
                remedy="run `distill-pretrain eval` without torchrun",
            )
    if recipe.eval.tasks:
        from distill_pretrain.eval.tasks import require_harness

        require_harness()


def _score(recipe: Recipe, models: dict[str, Path], held_out: SequenceData) -> EvalResults:
    from distill_pretrain.eval.targets import open_cache_of
    from distill_pretrain.files.disk import require_writable
    from distill_pretrain.processes.process import on_first_rank
    from distill_pretrain.reports.report import installed_versions, today
    from distill_pretrain.reports.results import EvalResults
    from distill_pretrain.teacher.engines import open_engine

    assert recipe.data and recipe.eval

    available = held_out.plan.num_sequences
    count = min(recipe.eval.num_sequences or available, available)
    cache = None
    if recipe.eval.cache is not None:
        cache = open_cache_of(
            recipe.eval.cache,
            held_out,
            num_sequences=count,
            key="eval.cache",
            corpus_key="data.held_out_tokens",
        )
    teacher = None
    if recipe.teacher is not None:
        assert recipe.data.held_out_tokens
        teacher = load_teacher(recipe.teacher, held_out, recipe.data.held_out_tokens)
    engines = {
        name: open_engine(
            "megatron",
            path,
            recipe.eval.dtype,
            vocab_size=held_out.vocab_size,
            seq_len=held_out.plan.seq_len,
            tokenizer_digests=held_out.tokenizer_digests,
        )
        for name, path in models.items()
    }
    inputs = _inputs(recipe, held_out, engines, models, teacher, cache, count)
    output = recipe.eval.output
    earlier = on_first_rank(lambda: _earlier(output))
    found = earlier if earlier is not None and earlier.inputs == inputs else None
    if found is None or recipe.eval.gradients is not None or recipe.eval.tasks:
        on_first_rank(lambda: require_writable(output))
    # What other files can spoil comes first.
    gradients = _gradients(recipe, teacher, earlier)
    tasks = _tasks(recipe, engines, teacher, held_out)
    if found is None:
        scores = _figures(recipe, held_out, engines, teacher, cache, count)
        found = EvalResults.of(scores, inputs=inputs, software=installed_versions(), date=today())
    found = replace(found, gradients=gradients, tasks=tasks)
    if found == earlier:
        say("already done:", output)
        return found
    if launch_rank() == 0:
        output.parent.mkdir(parents=True, exist_ok=True)
        dump_recipe(recipe, output.with_name(f"{output.name}.recipe.yaml"))
        found.save(output)
    return found


def _figures(
    recipe: Recipe,
    held_out: SequenceData,
    engines: dict[str, LogitsEngine],
    teacher: LogitsEngine | None,
    cache: CacheReader | None,
    count: int,
) -> dict[str, ModelScores]:
    """Every model's scores on the first `count` held-out sequences."""
    from distill_pretrain.eval.heldout import evaluate
    from distill_pretrain.eval.metrics import ScoreSettings

    assert recipe.eval
    share = -(-count // launch_world_size())
    with progress(share, "scoring", unit="sequences per process") as bar:
        return evaluate(
            engines,
            teacher,
            held_out.plan,
            cache=cache,
            settings=ScoreSettings(
                ece_bins=recipe.eval.ece_bins, draft_lengths=_draft_lengths(recipe)
            ),
            num_sequences=count,
            micro_batch_size=recipe.eval.micro_batch_size,
            rank=launch_rank(),
            world_size=launch_world_size(),
            all_reduce_sum=_all_reduce_sum,
            progress=bar.advance,
        )


def _gradients(
    recipe: Recipe, teacher: LogitsEngine | None, earlier: EvalResults | None
) -> dict[str, Any] | None:
    """Gradients of eval.gradients, or those of an earlier run with the same inputs."""
    assert recipe.data and recipe.eval
    config = recipe.eval.gradients
    if config is None:
        return None
    assert teacher is not None
    from distill_pretrain.data.sources import open_sequences
    from distill_pretrain.eval.gradients import compare_gradients
    from distill_pretrain.eval.student import CheckpointStudent
    from distill_pretrain.eval.targets import gradient_batches, open_cache_of

    data = open_sequences(recipe.data)
    most = max(config.num_batches)
    if most * config.micro_batch_size > data.num_sequences:
        raise ConfigError(
            "data.tokens has too few sequences for the gradients",
            where="eval.gradients.num_batches",
            found=f"{most} micro-batches of {config.micro_batch_size}",
            expected=f"at most {data.num_sequences // config.micro_batch_size} micro-batches",
            remedy="lower num_batches or micro_batch_size",
        )
    caches = {
        name: open_cache_of(
            location,
            data,
            num_sequences=most * config.micro_batch_size,
            key=f"eval.gradients.caches.{name}",
            corpus_key="data.tokens",
        )
        for name, location in config.caches.items()
    }
    student = CheckpointStudent(config.model, vocab_size=data.vocab_size)
    inputs = {
        "model": {"path": str(config.model), "checkpoint_sha256": student.sha256},
        "teacher": teacher.identity,
        "sequence_plan_id": data.plan.plan_id,
        "caches": {name: _cache_identity(cache) for name, cache in caches.items()},
        "num_batches": sorted(set(config.num_batches)),
        "micro_batch_size": config.micro_batch_size,
        "residual": config.residual,
    }
    if earlier is not None and earlier.gradients and earlier.gradients["inputs"] == inputs:
        return earlier.gradients
    with progress(most, "gradients", unit="micro-batches") as bar:
        batches = gradient_batches(
            data, caches, num_batches=most, micro_batch_size=config.micro_batch_size
        )
        found = compare_gradients(
            student,
            teacher,
            batches,
            num_batches=config.num_batches,
            residual=config.residual,
            progress=bar.advance,
        )
    return {"inputs": inputs, "caches": found}


def _tasks(
    recipe: Recipe,
    engines: dict[str, LogitsEngine],
    teacher: LogitsEngine | None,
    held_out: SequenceData,
) -> dict[str, Any] | None:
    """Figures of eval.tasks, from rank 0; always anew, since the files of a task may have changed."""
    assert recipe.data and recipe.data.held_out_tokens and recipe.eval
    config, tokens = recipe.eval, recipe.data.held_out_tokens
    if not config.tasks:
        return None
    from distill_pretrain.corpus.tokenizers import load_recorded_tokenizer
    from distill_pretrain.corpus.tokens_record import TokensRecord
    from distill_pretrain.eval.heldout import TEACHER
    from distill_pretrain.eval.tasks import run_tasks
    from distill_pretrain.processes.process import on_first_rank

    record = TokensRecord.beside(tokens)
    if record is None:
        raise ConfigError(
            "tasks are text, and the models' tokenizer is unknown",
            where="eval.tasks",
            found=f"no tokens.json beside {tokens}",
            remedy="tokenise the held-out text with `distill-pretrain tokenize`",
        )
    used = record.tokenizer
    tokenizer = load_recorded_tokenizer(
        tokens.parent, kind=used["kind"], file=used["file"], sha256=used["sha256"]
    )
    models = engines if teacher is None else {**engines, TEACHER: teacher}
    found = on_first_rank(
        lambda: run_tasks(
            models,
            tokenizer,
            config.tasks,
            tasks_path=config.tasks_path,
            max_length=held_out.plan.seq_len,
            batch_size=config.micro_batch_size,
        )
    )
    inputs = {
        "tasks": list(config.tasks),
        "tasks_path": None if config.tasks_path is None else str(config.tasks_path),
        "num_fewshot": 0,
        "max_length": held_out.plan.seq_len,
        "models": {name: engine.identity for name, engine in models.items()},
    }
    return {"inputs": inputs, "models": found}


def _inputs(
    recipe: Recipe,
    held_out: SequenceData,
    engines: dict[str, LogitsEngine],
    models: dict[str, Path],
    teacher: LogitsEngine | None,
    cache: CacheReader | None,
    count: int,
) -> dict[str, Any]:
    """All that decides the figures."""
    assert recipe.eval
    reference = None
    if teacher is not None:
        assert recipe.teacher
        reference = {"path": str(recipe.teacher.path), "identity": teacher.identity}
    return {
        "held_out": held_out.index.fingerprint.as_dict(),
        "sequence_plan_id": held_out.plan.plan_id,
        "seq_len": held_out.plan.seq_len,
        "vocab_size": held_out.vocab_size,
        "num_sequences": count,
        "models": {
            name: {"path": str(models[name]), "identity": engine.identity}
            for name, engine in engines.items()
        },
        "teacher": reference,
        "cache": None if cache is None else _cache_identity(cache),
        "ece_bins": recipe.eval.ece_bins,
        "draft_lengths": list(_draft_lengths(recipe)),
    }


def _draft_lengths(recipe: Recipe) -> tuple[int, ...]:
    assert recipe.eval
    return tuple(sorted(set(recipe.eval.draft_lengths)))


def _cache_identity(cache: CacheReader) -> dict[str, Any]:
    return {
        "location": cache.location,
        "manifest_sha256": cache.manifest_sha256,
        "sampler": cache.plan.sampler,
    }


def _earlier(output: Path) -> EvalResults | None:
    """The results of an earlier run, if there are any."""
    from distill_pretrain.reports.results import EvalFileError, EvalResults

    try:
        return EvalResults.load(output)
    except EvalFileError:
        return None


def _all_reduce_sum(state: torch.Tensor) -> None:
    import torch.distributed as dist

    from distill_pretrain.processes.process import local_device

    moved = state.to(local_device())
    dist.all_reduce(moved)
    state.copy_(moved)


def _print_table(results: EvalResults) -> None:
    table = [[name, *_row(score)] for name, score in results.scores.items()]
    columns = [
        "held-out CE",
        "perplexity",
        "ECE",
        "KL(teacher||model)",
        "top-1 agreement",
        "acceptance",
    ]
    if any(score["kl_cache"] is not None for score in results.scores.values()):
        columns.append("KL(cache||model)")
    _say_table(["model", *columns], table)
    if results.gradients is not None:
        rows = [
            [
                name,
                f"{row['num_positions']:,}",
                _cell(row["angle_degrees"], ".1f"),
                _cell(row["norm_ratio"], ".3f"),
            ]
            for name, found in results.gradients["caches"].items()
            for row in found
        ]
        _say_table(["gradient against FullKD", "positions", "angle (degrees)", "norm ratio"], rows)
    if results.tasks is not None:
        rows = [
            [name, task, metric, f"{value:.4f}"]
            for name, found in results.tasks["models"].items()
            for task, metrics in found.items()
            for metric, value in metrics.items()
        ]
        _say_table(["model", "task", "metric", "value"], rows)


def _row(score: dict[str, Any]) -> list[str]:
    return [
        _cell(score["ce"], ".4f"),
        _cell(score["perplexity"], ".3f"),
        _cell(score["ece"], ".2%"),
        _cell(score["kl"], ".4f"),
        _cell(score["top1_agreement"], ".1%"),
        _cell(score["acceptance"], ".1%"),
        _cell(score["kl_cache"], ".4f"),
    ]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _say_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns of equal width, the first to the left; cells beyond the header are left out."""
    cells = [header, *(row[: len(header)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = [f"{text:>{width}}" for text, width in zip(row[1:], widths[1:], strict=True)]
        say("  ".join([f"{row[0]:<{widths[0]}}", *padded]))
