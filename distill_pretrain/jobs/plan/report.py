"""The parts of a plan, from the sections of a recipe; formulas are in `planning`."""

from __future__ import annotations

from distill_pretrain.jobs.plan.break_even import break_even_part
from distill_pretrain.jobs.plan.cache import StoredTargets, samplers_part
from distill_pretrain.jobs.plan.capture import capture_part, teacher_speed
from distill_pretrain.jobs.plan.corpus import corpus_of, corpus_part
from distill_pretrain.jobs.plan.disk import disk_part
from distill_pretrain.jobs.plan.evaluation import evaluation_part
from distill_pretrain.jobs.plan.student import (
    memory_part,
    online_teacher_bytes,
    plan_settings,
    student_job,
)
from distill_pretrain.jobs.plan.training import training_part
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.planning.cache_size import (
    load_pilot,
)
from distill_pretrain.planning.figures import (
    PlanReport,
)


def plan_report(recipe: Recipe) -> PlanReport:
    """Compute every part of the plan that the recipe's sections allow.

    Raises:
        ConfigError: sizes that must be known are not.
        LayoutError: the student's layout does not fit.
    """
    assert recipe.data
    settings = plan_settings(recipe)
    corpus = corpus_of(recipe)
    pilot = load_pilot(settings.pilot)
    report = PlanReport()
    if corpus.shares is not None:
        report.parts.append(corpus_part(corpus))
    speed, capture_hours, stored = None, None, None
    if recipe.capture:
        stored = StoredTargets.of(recipe.capture, corpus, pilot)
        report.parts.append(stored.part())
        if pilot is not None and pilot.figures:
            report.parts.append(samplers_part(pilot, stored.geometry, recipe.capture))
    if recipe.capture and recipe.teacher:
        speed = teacher_speed(recipe.teacher, recipe.capture, settings)
        part, capture_hours = capture_part(recipe.teacher, stored, speed)
        report.parts.append(part)
    if recipe.model and recipe.train:
        job = student_job(recipe, corpus, world_size=settings.gpus)
        beside = online_teacher_bytes(recipe, corpus)
        on_cpu = student_job(recipe, corpus, world_size=settings.gpus, on_gpu=False)
        report.parts.append(memory_part(job, settings, beside, on_cpu=on_cpu))
        report.parts.append(disk_part(job, recipe.train))
        report.parts.append(training_part(recipe, job, stored))
        if stored and speed and capture_hours is not None and recipe.teacher:
            report.parts.append(
                break_even_part(recipe, job, recipe.teacher, stored, speed, capture_hours)
            )
    if recipe.eval:
        report.parts.append(evaluation_part(recipe, corpus, settings))
    return report
