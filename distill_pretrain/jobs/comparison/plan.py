"""From the recipe of a comparison to the recipes of its jobs: teacher, capture, every student, every evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from distill_pretrain.errors import ConfigError
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.jobs.settings import with_settings
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.reports.comparison.config import (
    CellConfig,
    CompareConfig,
    default_cells,
    default_sets,
)
from distill_pretrain.reports.comparison.results import CellSpec
from distill_pretrain.sampling.kinds import TRUNCATED

TEACHER_SECTIONS = ("data", "model", "parallel", "optimizer", "objective", "train")


@dataclass(frozen=True)
class StudentRun:
    """One student to train: a cell and a seed."""

    cell: str
    seed: int
    recipe: Recipe

    @property
    def folder(self) -> Path:
        """The run folder of this student."""
        assert self.recipe.train
        return self.recipe.train.output_dir

    def __str__(self) -> str:
        return f"{self.cell}, seed {self.seed}"


@dataclass(frozen=True)
class ComparisonPlan:
    """The jobs of a comparison; making it checks every recipe.

    Attributes:
        recipe: of the comparison, with its cells and target sets written out.
    """

    recipe: Recipe

    @classmethod
    def of(cls, recipe: Recipe) -> ComparisonPlan:
        """Fill in default sets and cells, and check all that can be checked before hours of work.

        Raises:
            ConfigError: names the cell or the key.
        """
        assert recipe.data and recipe.capture and recipe.compare
        if recipe.data.cache is not None or recipe.capture.num_sequences is not None:
            raise ConfigError(
                "a comparison chooses the cache of every cell itself, and captures what it trains on",
                where="data.cache, capture.num_sequences",
                remedy="leave both out; data.num_sequences limits the capture and the students",
            )
        if recipe.compare.cells is None and not recipe.capture.sets:
            recipe = with_settings(recipe, "capture.sets", {"capture": {"sets": default_sets()}})
        assert recipe.capture and recipe.compare
        if recipe.compare.cells is None:
            samplers = {name: kept.sampler for name, kept in (recipe.capture.sets or {}).items()}
            fixes_at = recipe.compare.fixes_at
            if fixes_at is not None and samplers.get(fixes_at) not in TRUNCATED:
                raise ConfigError(
                    "the fixes of missing mass need a truncated target set",
                    where="compare.fixes_at",
                    found=fixes_at,
                    expected=_one_of(
                        "capture.sets", [n for n, kind in samplers.items() if kind in TRUNCATED]
                    ),
                )
            cells = default_cells(samplers, fixes_at=fixes_at)
            recipe = recipe.model_copy(
                update={"compare": recipe.compare.model_copy(update={"cells": cells})}
            )
        plan = cls(recipe)
        plan._check_names()
        # Made once, here, so that a refused setting shows before any work.
        _ = plan.runs, plan.evaluations, plan.teacher
        plan._check_targets()
        return plan

    @property
    def compare(self) -> CompareConfig:
        """The section `compare`."""
        assert self.recipe.compare
        return self.recipe.compare

    @property
    def cells(self) -> dict[str, CellConfig]:
        """Every cell by name."""
        assert self.compare.cells
        return self.compare.cells

    @property
    def needs_cache(self) -> bool:
        """Whether any cell learns from a cache."""
        return any(cell.set is not None for cell in self.cells.values())

    @cached_property
    def teacher(self) -> Recipe | None:
        """The job that trains the teacher, if the comparison does."""
        overrides = self.compare.teacher
        if overrides is None:
            return None
        assert self.recipe.teacher
        plain = ObjectiveConfig().model_dump(mode="json")
        own = {"start_from": None, **overrides.get("train", {})}
        train = {**own, "output_dir": str(self.recipe.teacher.path)}
        return with_settings(
            self.recipe.model_copy(update={"compare": None, "capture": None, "teacher": None}),
            "compare.teacher",
            {**overrides, "objective": {**plain, **overrides.get("objective", {})}, "train": train},
        )

    @property
    def capture(self) -> Recipe:
        """The job that writes the caches of all target sets in one pass of the teacher."""
        assert self.recipe.capture
        used = {cell.set for cell in self.cells.values()}
        sets = {
            name: kept for name, kept in (self.recipe.capture.sets or {}).items() if name in used
        }
        return self.recipe.model_copy(
            update={"capture": self.recipe.capture.model_copy(update={"sets": sets})}
        )

    @cached_property
    def runs(self) -> list[StudentRun]:
        """Every student, seed by seed, in the order of the cells."""
        return [
            StudentRun(name, seed, self._student(name, cell, seed))
            for seed in self.compare.seeds
            for name, cell in self.cells.items()
        ]

    @cached_property
    def evaluations(self) -> dict[int, Recipe]:
        """Seed to the job that scores its students; one file per seed bounds what is in memory at a time."""
        return {
            seed: with_settings(
                self.recipe.model_copy(update={"compare": None}),
                "compare.eval",
                {
                    "eval": {
                        **self.compare.eval,
                        "models": {r.cell: str(r.folder) for r in self.runs if r.seed == seed},
                        "output": str(self.compare.output_dir / "eval" / f"seed-{seed}.json"),
                    },
                    **self._teacher_beside_students(),
                },
            )
            for seed in self.compare.seeds
        }

    @property
    def figures(self) -> dict[int, Path]:
        """Seed to the file with its held-out figures."""
        return {seed: job.eval.output for seed, job in self.evaluations.items() if job.eval}

    @property
    def specs(self) -> list[CellSpec]:
        """What the report has to know of every cell."""
        return [self._spec(name, cell) for name, cell in self.cells.items()]

    def cache(self, cell: str) -> Path | None:
        """Return the cache that a cell learns from."""
        assert self.recipe.capture
        name = self.cells[cell].set
        return None if name is None else self.recipe.capture.output_dir / name

    def selected(self, cells: Sequence[str]) -> list[StudentRun]:
        """Return the students of some cells; of all if none is named.

        Raises:
            ConfigError: there is no such cell.
        """
        unknown = sorted(set(cells) - set(self.cells))
        if unknown:
            raise ConfigError(
                "no such cell",
                where="--cells, compare.only",
                found=", ".join(unknown),
                expected=f"out of: {', '.join(self.cells)}",
            )
        return [run for run in self.runs if not cells or run.cell in cells]

    def _spec(self, name: str, cell: CellConfig) -> CellSpec:
        assert self.recipe.capture
        runs = {run.seed: run for run in self.runs if run.cell == name}
        objective = next(iter(runs.values())).recipe.objective
        kept = (self.recipe.capture.sets or {}).get(cell.set or "")
        cache = self.cache(name)
        truncated = kept is not None and kept.sampler in TRUNCATED
        return CellSpec(
            name=name,
            sampler=None if kept is None else kept.sampler,
            num_draws=None if kept is None else kept.num_draws,
            residual=objective.residual if truncated else None,
            online=objective.target == "teacher" and objective.peak_kd_weight > 0,
            plain=_is_plain(objective, residual_counts=not truncated),
            cache=None if cache is None else str(cache),
            runs={seed: run.folder for seed, run in runs.items()},
        )

    def _student(self, name: str, cell: CellConfig, seed: int) -> Recipe:
        cache = self.cache(name)
        folder = self.compare.output_dir / "cells" / name / f"seed-{seed}"
        return with_settings(
            self.recipe.model_copy(update={"compare": None, "capture": None}),
            f"compare.cells.{name}",
            {
                "data": {"cache": None if cache is None else str(cache)},
                "objective": cell.objective,
                "train": {"seed": seed, "output_dir": str(folder)},
            },
        )

    def _teacher_beside_students(self) -> dict[str, dict[str, int]]:
        """Return what differs in the teacher's section when it scores: whole students take a whole teacher."""
        teacher = self.recipe.teacher
        in_parts = {"tensor", "pipeline"} & self.compare.eval.keys()
        if teacher is None or teacher.kind != "megatron" or in_parts:
            return {}
        return {"teacher": {"tensor": 1, "pipeline": 1}}

    def _check_targets(self) -> None:
        assert self.recipe.capture
        for run in self.runs:
            kept = (self.recipe.capture.sets or {}).get(self.cells[run.cell].set or "")
            if kept and kept.sampler not in TRUNCATED and run.recipe.objective.needs_truncated:
                raise ConfigError(
                    "the objective of a cell is for truncated targets, and its set is sampled",
                    where=f"compare.cells.{run.cell}.objective",
                    found=f"{self.cells[run.cell].set}: {kept.sampler}",
                    expected=f"a set of {' or '.join(sorted(TRUNCATED))}",
                )

    def _check_names(self) -> None:
        assert self.recipe.capture
        sets = self.recipe.capture.sets or {}
        for name, cell in self.cells.items():
            if cell.set is not None and cell.set not in sets:
                raise ConfigError(
                    "a cell learns from a target set that is not captured",
                    where=f"compare.cells.{name}.set",
                    found=cell.set,
                    expected=_one_of("capture.sets", sets),
                )
        foreign = sorted(set(self.compare.teacher or ()) - set(TEACHER_SECTIONS))
        if foreign:
            raise ConfigError(
                "the training of the teacher does not read these sections",
                where="compare.teacher",
                found=", ".join(foreign),
                expected=f"out of: {', '.join(TEACHER_SECTIONS)}",
            )


def _is_plain(objective: ObjectiveConfig, *, residual_counts: bool) -> bool:
    """Whether a loss is cross-entropy alone or distillation alone, every other key at its default."""
    weights = (objective.ce_weight, objective.kd_weight)
    varied = {"ce_weight", "kd_weight", "target"} | (set() if residual_counts else {"residual"})
    default = ObjectiveConfig().model_dump(exclude=varied)
    return weights in ((1.0, 0.0), (0.0, 1.0)) and objective.model_dump(exclude=varied) == default


def _one_of(key: str, names: Iterable[str]) -> str:
    return f"one of {key}: {', '.join(names) or 'none'}"
