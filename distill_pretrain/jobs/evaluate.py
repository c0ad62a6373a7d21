"""Evaluating: the models of a recipe on held-out text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_pretrain.config import dump_recipe, require
from distill_pretrain.errors import ConfigError
from distill_pretrain.jobs.console import progress, say
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.jobs.teachers import apart, load_teacher
from distill_pretrain.processes.env import launch_rank, launch_world_size

if TYPE_CHECKING:
    import torch

    from distill_pretrain.cache.reader import CacheReader
    from distill_pretrain.contracts import LogitsEngine
    from distill_pretrain.data.config import DataConfig
    from distill_pretrain.data.sources import SequenceData
    from distill_pretrain.eval.config import EvalConfig, GradientsConfig
    from distill_pretrain.eval.metrics import ModelScores
    from distill_pretrain.reports.results import EvalResults
    from distill_pretrain.teacher.config import TeacherConfig


def evaluate_models(recipe: Recipe) -> EvalResults:
    """Score the models of a recipe, with all processes of the job, and write eval.output.

    Args:
        recipe: with the sections data and eval; teacher, if there is one.

    Returns:
        The figures, on every process.

    Raises:
        ConfigError: settings that cannot be used.
        DistillPretrainError: corpus, models, teacher or cache do not fit.
    """
    require(recipe, "eval", "data", "eval")
    assert recipe.data and recipe.eval
    if recipe.data.held_out_tokens is None:
        raise ConfigError(
            "there is no held-out text to score on",
            where="data.held_out_tokens",
            expected="prefix of a .bin/.idx pair",
            remedy="`distill-pretrain tokenize` writes one, held_out, beside train",
        )
    models = _models(recipe.eval, recipe.teacher)
    _check_extras(recipe.eval, has_teacher=recipe.teacher is not None)
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
            return _score(
                recipe.data,
                recipe.eval,
                recipe.teacher,
                models,
                held_out,
                save_recipe=lambda path: dump_recipe(recipe, path),
            )


def _models(config: EvalConfig, teacher: TeacherConfig | None) -> dict[str, Path]:
    """eval.models, less the teacher where it is listed among them."""
    models = dict(config.models)
    if teacher is None or "teacher" not in models:
        return models
    if models["teacher"].absolute() != teacher.path.absolute():
        raise ConfigError(
            "the name `teacher` stands for the model in the section teacher",
            where="eval.models.teacher",
            found=models["teacher"],
            expected=f"{teacher.path}, or another name",
            remedy="rename it",
        )
    del models["teacher"]
    return models


def _check_extras(config: EvalConfig, *, has_teacher: bool) -> None:
    """Raises before anything is scored if gradients or tasks could not be computed."""
    if config.gradients is not None:
        if not has_teacher:
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
    if config.tasks:
        from distill_pretrain.eval.tasks import require_harness

        require_harness()


def _score(
    data: DataConfig,
    config: EvalConfig,
    reference: TeacherConfig | None,
    models: dict[str, Path],
    held_out: SequenceData,
    *,
    save_recipe: Callable[[Path], None],
) -> EvalResults:
    """The figures of all models, kept where eval.output has them, and eval.output."""
    from distill_pretrain.data.sources import open_cache_of
    from distill_pretrain.eval.heldout import TEACHER
    from distill_pretrain.files.disk import require_writable
    from distill_pretrain.processes.process import on_first_rank
    from distill_pretrain.reports.report import installed_versions, today
    from distill_pretrain.reports.results import EvalResults
    from distill_pretrain.teacher.engines import open_engine

    available = held_out.plan.num_sequences
    count = min(config.num_sequences or available, available)
    cache = None
    if config.cache is not None:
        cache = open_cache_of(
            config.cache,
            held_out,
            num_sequences=count,
            key="eval.cache",
            corpus_key="data.held_out_tokens",
        )
    teacher = None
    assert data.held_out_tokens
    if reference is not None:
        teacher = load_teacher(reference, held_out, data.held_out_tokens)
    engines = {
        name: apart(
            open_engine(
                "megatron",
                path,
                config.dtype,
                vocab_size=held_out.vocab_size,
                seq_len=held_out.plan.seq_len,
                tokenizer_digests=held_out.tokenizer_digests,
            ),
            held_out,
        )
        for name, path in models.items()
    }
    paths = models if reference is None else {**models, TEACHER: reference.path}
    inputs = _inputs(config, held_out, engines, paths, teacher, cache, count)
    output = config.output
    earlier = on_first_rank(lambda: _earlier(output))
    found = earlier if earlier is not None and earlier.inputs == inputs else None
    if found is None or config.gradients is not None or config.tasks:
        on_first_rank(lambda: require_writable(output))
    # What other files can spoil comes first.
    gradients = _gradients(data, config.gradients, teacher, earlier)
    tasks = _tasks(config, data.held_out_tokens, engines, teacher, held_out)
    if found is None:
        scores = _figures(config, held_out, engines, teacher, cache, count)
        found = EvalResults.of(scores, inputs=inputs, software=installed_versions(), date=today())
    found = replace(found, gradients=gradients, tasks=tasks)
    if found == earlier:
        say("already done:", output)
        return found
    if launch_rank() == 0:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_recipe(output.with_name(f"{output.name}.recipe.yaml"))
        found.save(output)
    return found


def _figures(
    config: EvalConfig,
    held_out: SequenceData,
    engines: dict[str, LogitsEngine],
    teacher: LogitsEngine | None,
    cache: CacheReader | None,
    count: int,
) -> dict[str, ModelScores]:
    """Every model's scores on the first `count` held-out sequences."""
    from distill_pretrain.eval.heldout import evaluate
    from distill_pretrain.eval.metrics import ScoreSettings

    share = -(-count // launch_world_size())
    with progress(share, "scoring", unit="sequences per process") as bar:
        return evaluate(
            engines,
            teacher,
            held_out.plan,
            cache=cache,
            settings=ScoreSettings(ece_bins=config.ece_bins, draft_lengths=_draft_lengths(config)),
            num_sequences=count,
            micro_batch_size=config.micro_batch_size,
            rank=launch_rank(),
            world_size=launch_world_size(),
            all_reduce_sum=_all_reduce_sum,
            progress=bar.advance,
        )


def _gradients(
    source: DataConfig,
    config: GradientsConfig | None,
    teacher: LogitsEngine | None,
    earlier: EvalResults | None,
) -> dict[str, Any] | None:
    """Gradients of eval.gradients, or those of an earlier run with the same inputs."""
    if config is None:
        return None
    assert teacher is not None
    from distill_pretrain.data.sources import open_cache_of, open_sequences
    from distill_pretrain.eval.gradients import compare_gradients
    from distill_pretrain.eval.student import CheckpointStudent
    from distill_pretrain.eval.targets import gradient_batches

    if source.documents == "separate":
        what = "gradients are compared on joined documents alone"
        raise ConfigError(what, where="eval.gradients", found="data.documents: separate")
    data = open_sequences(source)
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
    config: EvalConfig,
    tokens: Path,
    engines: dict[str, LogitsEngine],
    teacher: LogitsEngine | None,
    held_out: SequenceData,
) -> dict[str, Any] | None:
    """Figures of eval.tasks, from rank 0; always anew, since the files of a task may have changed."""
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
    tokenizer = load_recorded_tokenizer(tokens.parent, record)
    models = engines if teacher is None else {**engines, TEACHER: teacher}
    # Its texts are one document each.
    models = {name: getattr(engine, "engine", engine) for name, engine in models.items()}
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
    config: EvalConfig,
    held_out: SequenceData,
    engines: dict[str, LogitsEngine],
    paths: dict[str, Path],
    teacher: LogitsEngine | None,
    cache: CacheReader | None,
    count: int,
) -> dict[str, Any]:
    """All that decides the figures."""
    from distill_pretrain.eval.heldout import TEACHER

    reference = None
    if teacher is not None:
        reference = {"path": str(paths[TEACHER]), "identity": teacher.identity}
    return {
        "held_out": held_out.index.fingerprint.as_dict(),
        "sequence_plan_id": held_out.plan.plan_id,
        "seq_len": held_out.plan.seq_len,
        "vocab_size": held_out.vocab_size,
        "num_sequences": count,
        "models": {
            name: {"path": str(paths[name]), "identity": engine.identity}
            for name, engine in engines.items()
        },
        "teacher": reference,
        "cache": None if cache is None else _cache_identity(cache),
        "ece_bins": config.ece_bins,
        "draft_lengths": list(_draft_lengths(config)),
    }


def _draft_lengths(config: EvalConfig) -> tuple[int, ...]:
    return tuple(sorted(set(config.draft_lengths)))


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
