"""Evaluating: the models of a recipe on held-out text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from distill_pretrain.config import dump_recipe, require
from distill_pretrain.errors import ConfigError
from distill_pretrain.jobs.console import progress, say
from distill_pretrain.jobs.evaluate_layout import check_layout, teacher_before, whole_teacher
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.processes.env import launch_rank, launch_world_size
from distill_pretrain.teacher.loading import apart, load_replica

if TYPE_CHECKING:
    from distill_pretrain.contracts import LogitsEngine, TeacherEngine
    from distill_pretrain.data.config import DataConfig
    from distill_pretrain.data.sources import SequenceData
    from distill_pretrain.eval.config import EvalConfig
    from distill_pretrain.eval.subject import Subject
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
    check_layout(recipe.eval, recipe.teacher)
    _check_extras(recipe.eval, recipe.teacher)
    from distill_pretrain.data.sources import open_sequences
    from distill_pretrain.processes.process import process_group, set_cpu_threads

    set_cpu_threads(0)
    with process_group():
        held_out = open_sequences(recipe.data, recipe.data.held_out_tokens)
        other = _out_of_domain(recipe.data, recipe.eval, held_out)
        from distill_pretrain.checkpoint.ownership import job_owning
        from distill_pretrain.files.ownership import owner_beside
        from distill_pretrain.mcore.model.layout import scoring_layout
        from distill_pretrain.mcore.runtime.parallel import model_parallel

        layout = scoring_layout(recipe.eval.tensor, recipe.eval.pipeline)
        output = recipe.eval.output
        with job_owning(
            owner_beside(output), what=output, remedy="wait for it, or set another eval.output"
        ):
            before = teacher_before(recipe.data, recipe.eval, recipe.teacher, held_out)
            with model_parallel(layout, seed=0):
                subject = _opened(
                    recipe.data, recipe.eval, recipe.teacher, models, held_out, before
                )
                return _evaluate(
                    subject, other, recipe.data, recipe.eval, lambda path: dump_recipe(recipe, path)
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


def _check_extras(config: EvalConfig, teacher: TeacherConfig | None) -> None:
    """Raise before anything is scored if gradients or tasks could not be computed."""
    if config.gradients is not None:
        if teacher is None:
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
        if config.tensor * config.pipeline > 1 or (teacher is not None and teacher.is_split):
            raise ConfigError(
                "tasks are run by one process, which must hold every model whole",
                where="eval.tasks",
                found="eval.tensor, eval.pipeline or the teacher's layout above 1",
                remedy="run them in an evaluation of their own, with whole models",
            )
        from distill_pretrain.eval.tasks import require_harness

        require_harness()


def _out_of_domain(
    data: DataConfig, config: EvalConfig, held_out: SequenceData
) -> SequenceData | None:
    """Open the second held-out corpus, if there is one, and check that it fits the first."""
    from distill_pretrain.data.sources import open_sequences, require_one_tokenizer
    from distill_pretrain.errors import TokenizerMismatch

    if config.out_of_domain_tokens is None:
        return None
    assert data.held_out_tokens
    what, where = (
        "the two held-out corpora",
        f"eval.out_of_domain_tokens {config.out_of_domain_tokens}",
    )
    other = open_sequences(data, config.out_of_domain_tokens)
    require_one_tokenizer(held_out, data.held_out_tokens, other, what=what, where=where)
    if other.plan.document_end != held_out.plan.document_end:
        raise TokenizerMismatch(
            f"{what} end their documents with different tokens",
            where=where,
            found=other.plan.document_end,
            expected=held_out.plan.document_end,
            remedy="tokenise both with the same tokenizer and tokenizer.end_of_document",
        )
    return other


def _opened(
    data: DataConfig,
    config: EvalConfig,
    reference: TeacherConfig | None,
    models: dict[str, Path],
    held_out: SequenceData,
    teacher: LogitsEngine | TeacherEngine | None,
) -> Subject:
    """Open all that is scored, the teacher if it is not open; a file that does not fit is refused here."""
    from distill_pretrain.data.sources import open_cache_of
    from distill_pretrain.eval.heldout import TEACHER
    from distill_pretrain.eval.metrics import ScoreSettings
    from distill_pretrain.eval.subject import Subject
    from distill_pretrain.teacher.engines import open_engine

    assert data.held_out_tokens
    count = _scored(config, held_out)
    cache = None
    if config.cache is not None:
        cache = open_cache_of(
            config.cache,
            held_out,
            num_sequences=count,
            key="eval.cache",
            corpus_key="data.held_out_tokens",
        )
    if reference is not None and reference.is_split:
        teacher = load_replica(reference, held_out, data.held_out_tokens)
    elif reference is not None and teacher is None:
        teacher = whole_teacher(data, reference, held_out)
    engines = {
        name: apart(
            open_engine(
                "megatron",
                path,
                config.dtype,
                vocab_size=held_out.vocab_size,
                seq_len=held_out.plan.seq_len,
                tokenizer_digests=held_out.tokenizer_digests,
                tensor=config.tensor,
                pipeline=config.pipeline,
                head_chunk_tokens=config.head_chunk_tokens,
            ),
            held_out,
        )
        for name, path in models.items()
    }
    return Subject(
        held_out=held_out,
        num_sequences=count,
        engines=engines,
        paths=models if reference is None else {**models, TEACHER: reference.path},
        teacher=teacher,
        cache=cache,
        settings=ScoreSettings(
            ece_bins=config.ece_bins, draft_lengths=tuple(sorted(set(config.draft_lengths)))
        ),
    )


def _scored(config: EvalConfig, text: SequenceData) -> int:
    """The number of sequences of a text to score."""
    return min(config.num_sequences or text.plan.num_sequences, text.plan.num_sequences)


def _evaluate(
    subject: Subject,
    other: SequenceData | None,
    data: DataConfig,
    config: EvalConfig,
    save_recipe: Callable[[Path], None],
) -> EvalResults:
    """Compute the figures that eval.output does not hold yet, and write all of them there."""
    from distill_pretrain.files.disk import require_writable
    from distill_pretrain.processes.process import on_first_rank
    from distill_pretrain.reports.report import installed_versions, today
    from distill_pretrain.reports.results import EvalResults

    inputs, output = subject.inputs(), config.output
    earlier = on_first_rank(lambda: _earlier(output))
    found = earlier if earlier is not None and earlier.inputs == inputs else None
    asked = (other, config.copying, config.gradients)
    if found is None or config.tasks or any(part is not None for part in asked):
        on_first_rank(lambda: require_writable(output))
    # What other files can spoil comes first.
    gradients, tasks = _on_request(
        subject, data, config, before=None if earlier is None else earlier.gradients
    )
    if found is None:
        with progress(subject.share, "scoring", unit="sequences per copy of the models") as bar:
            scores = subject.scores(micro_batch_size=config.micro_batch_size, progress=bar.advance)
        found = EvalResults.of(scores, inputs=inputs, software=installed_versions(), date=today())
    found = replace(
        found,
        out_of_domain=_on_other_text(subject, other, config, earlier),
        copying=_copying(subject, data, config, earlier),
        gradients=gradients,
        tasks=tasks,
    )
    if found == earlier:
        say("already done:", output)
        return found
    if launch_rank() == 0:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_recipe(output.with_name(f"{output.name}.recipe.yaml"))
        found.save(output)
    return found


def _on_other_text(
    subject: Subject, other: SequenceData | None, config: EvalConfig, earlier: EvalResults | None
) -> dict[str, Any] | None:
    """Return the figures on eval.out_of_domain_tokens, those of an earlier run where its inputs are the same."""
    from distill_pretrain.reports.results import text_figures

    if other is None:
        return None
    moved = subject.on(other, _scored(config, other))
    inputs = moved.inputs()
    if earlier is not None and (earlier.out_of_domain or {}).get("inputs") == inputs:
        return earlier.out_of_domain
    with progress(moved.share, "out of domain", unit="sequences per process") as bar:
        scores = moved.scores(micro_batch_size=config.micro_batch_size, progress=bar.advance)
    return text_figures(scores, inputs)


def _copying(
    subject: Subject, data: DataConfig, config: EvalConfig, earlier: EvalResults | None
) -> dict[str, Any] | None:
    """Return the figures of eval.copying, those of an earlier run where its inputs are the same."""
    if config.copying is None:
        return None
    from distill_pretrain.corpus.tokens_record import TokensRecord
    from distill_pretrain.eval.copying import copying_figures

    assert data.held_out_tokens
    record = TokensRecord.beside(data.held_out_tokens)
    total = 2 * subject.share_of(config.copying.num_sequences)
    with progress(total, "copying", unit="sequences per process") as bar:
        return copying_figures(
            subject,
            config.copying,
            None if earlier is None else earlier.copying,
            end_of_document=None if record is None else record.eod_id,
            micro_batch_size=config.micro_batch_size,
            progress=bar.advance,
        )


def _on_request(
    subject: Subject, data: DataConfig, config: EvalConfig, *, before: dict[str, Any] | None
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return the figures of eval.gradients and of eval.tasks, None where they are not asked for.

    `before` has the gradients of an earlier run, which are kept if their inputs are the same.
    """
    gradients = tasks = None
    if config.gradients is not None:
        from distill_pretrain.eval.gradient_figures import gradient_figures

        teacher = cast("LogitsEngine", subject.teacher)  # whole, in the job's only process
        with progress(max(config.gradients.num_batches), "gradients", unit="micro-batches") as bar:
            gradients = gradient_figures(
                data, config.gradients, teacher, before, progress=bar.advance
            )
    if config.tasks:
        from distill_pretrain.eval.tasks import task_figures

        assert data.held_out_tokens
        tasks = task_figures(
            config,
            data.held_out_tokens,
            cast("dict[str, LogitsEngine]", subject.models),  # whole: see `_check_extras`
            max_length=subject.held_out.plan.seq_len,
        )
    return gradients, tasks


def _earlier(output: Path) -> EvalResults | None:
    """Read the results of an earlier run; None if there are none that can be read."""
    from distill_pretrain.reports.results import EvalFileError, EvalResults

    try:
        return EvalResults.load(output)
    except EvalFileError:
        return None
