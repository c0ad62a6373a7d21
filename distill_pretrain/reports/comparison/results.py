"""The figures of a comparison: cells x seeds, what they cost, and how they differ.

A spread is the standard deviation over seeds; the error of a difference is the standard error of the mean of the
differences per seed, whose two students began with equal weights and saw equal batches.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from distill_pretrain.cache.reader import CacheReader
from distill_pretrain.eval.heldout import TEACHER
from distill_pretrain.reports.curves import TrainingCurve
from distill_pretrain.reports.results import EvalResults
from distill_pretrain.sampling.kinds import UNBIASED


@dataclass(frozen=True, kw_only=True)
class CellSpec:
    """Where the results of one cell are, and what it learnt from.

    Attributes:
        name: of the cell.
        sampler: of its target set; None without a cache.
        num_draws: N, or k, of its target set.
        residual: what it does with the mass that is missing; None where none is.
        online: whether it learns from the teacher itself (FullKD).
        plain: cross-entropy alone, or distillation alone, without further changes to the loss.
        cache: folder or URL of its target set.
        runs: seed -> run folder.
    """

    name: str
    sampler: str | None = None
    num_draws: int | None = None
    residual: str | None = None
    online: bool = False
    plain: bool = True
    cache: str | None = None
    runs: Mapping[int, Path]

    @property
    def on_text_alone(self) -> bool:
        """Whether it has no teacher at all."""
        return self.sampler is None and not self.online


@dataclass(frozen=True)
class Mean:
    """A mean over n seeds.

    Attributes:
        value: the mean.
        spread: standard deviation over seeds; None for one seed.
        error: standard error of the mean; None for one seed.
        n: seeds.
    """

    value: float
    spread: float | None
    error: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Compute mean, spread and standard error of one value per seed."""
        spread = statistics.stdev(values) if len(values) > 1 else None
        error = None if spread is None else spread / math.sqrt(len(values))
        return cls(statistics.fmean(values), spread, error, len(values))


def mean_over_seeds(figures: Mapping[int, dict[str, Any]], field: str) -> Mean | None:
    """Return the mean of one figure of {seed: figures}; None where not every seed has it, or there is no seed."""
    values = [of_seed.get(field) for of_seed in figures.values()]
    known = [float(value) for value in values if value is not None]
    return Mean.of(known) if known and len(known) == len(values) else None


@dataclass(frozen=True, kw_only=True)
class CellResults:
    """The figures of one cell.

    Attributes:
        spec: what it is.
        scores: seed -> held-out figures, as in the file of `eval`.
        curves: seed -> training log.
        unique_ids: stored entries per position; None without a cache.
        bytes_per_token: of its cache; None without one.
        elsewhere: seed -> figures on the second held-out text; empty where there is none.
        copying: seed -> figures of the copying probe; empty where there was none.
    """

    spec: CellSpec
    scores: Mapping[int, dict[str, Any]]
    curves: Mapping[int, TrainingCurve]
    unique_ids: float | None
    bytes_per_token: float | None
    elsewhere: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    copying: Mapping[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the cell."""
        return self.spec.name

    def mean(self, field: str) -> Mean | None:
        """Return the mean of a figure over the seeds; None where `eval` did not compute it."""
        return mean_over_seeds(self.scores, field)

    def minus(self, other: CellResults, field: str) -> Mean | None:
        """Return the mean over seeds of this cell's figure minus the other's."""
        gaps = []
        for seed, scores in self.scores.items():
            mine, theirs = scores.get(field), other.scores[seed].get(field)
            if mine is None or theirs is None:
                return None
            gaps.append(float(mine) - float(theirs))
        return Mean.of(gaps)

    @property
    def tokens_per_second(self) -> float:
        """The median over the steps of all seeds, for the whole job."""
        return statistics.median(
            float(speed) for curve in self.curves.values() for speed in curve["tokens_per_second"]
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that the report says is computed from this.

    Attributes:
        cells: in the order of the recipe.
        teacher: its held-out figures.
        evaluations: seed -> the file of `eval`.
    """

    cells: tuple[CellResults, ...]
    teacher: dict[str, Any]
    evaluations: Mapping[int, EvalResults]

    @classmethod
    def load(cls, specs: Sequence[CellSpec], evaluations: Mapping[int, Path]) -> Comparison:
        """Read caches' totals, training logs and held-out figures.

        Raises:
            EvalFileError, RunLogError, CacheError: missing or damaged.
        """
        results = {seed: EvalResults.load(path) for seed, path in evaluations.items()}
        costs = {spec.cache: _cost(spec.cache) for spec in specs if spec.cache is not None}
        cells = []
        for spec in specs:
            unique_ids, bytes_per_token = costs.get(spec.cache or "", (None, None))
            cells.append(
                CellResults(
                    spec=spec,
                    scores={seed: result.scores[spec.name] for seed, result in results.items()},
                    curves={seed: TrainingCurve.load(folder) for seed, folder in spec.runs.items()},
                    unique_ids=unique_ids,
                    bytes_per_token=bytes_per_token,
                    elsewhere=figures_beside(results, "out_of_domain", "scores", spec.name),
                    copying=figures_beside(results, "copying", "models", spec.name),
                )
            )
        teacher = next(iter(results.values())).scores[TEACHER]
        return cls(cells=tuple(cells), teacher=teacher, evaluations=results)

    @cached_property
    def text_only(self) -> CellResults | None:
        """The plain student that learns from the text alone: CE."""
        return next((c for c in self.cells if c.spec.on_text_alone and c.spec.plain), None)

    @cached_property
    def full(self) -> CellResults | None:
        """The student that learns from the teacher's whole distribution: FullKD."""
        return next((c for c in self.cells if c.spec.online and c.spec.plain), None)

    def family(self, sampler: str, residual: str | None = None) -> list[CellResults]:
        """List the plain cells of one sampler (and treatment of missing mass), by ascending unique ids."""
        found = [
            cell
            for cell in self.cells
            if cell.spec.sampler == sampler and cell.spec.residual == residual and cell.spec.plain
        ]
        return sorted(found, key=lambda cell: cell.unique_ids or 0.0)

    @property
    def sampled(self) -> list[CellResults]:
        """The plain cells of unbiased samples, by ascending unique ids."""
        found = [cell for sampler in UNBIASED for cell in self.family(sampler)]
        return sorted(found, key=lambda cell: cell.unique_ids or 0.0)

    def fixes(self) -> dict[str, list[CellResults]]:
        """Return cache -> the plain cells on it that differ in what they do with the missing mass, if several do."""
        groups: dict[str, list[CellResults]] = {}
        for cell in self.cells:
            if cell.spec.residual is not None and cell.spec.cache is not None and cell.spec.plain:
                groups.setdefault(cell.spec.cache, []).append(cell)
        return {cache: cells for cache, cells in groups.items() if len(cells) > 1}

    def gain(self, cell: CellResults) -> float | None:
        """Share of the way from CE's loss to FullKD's that a cell went, of the means over seeds."""
        if self.text_only is None or self.full is None:
            return None
        whole = self.full.minus(self.text_only, "ce")
        part = cell.minus(self.text_only, "ce")
        if whole is None or part is None or whole.value == 0:
            return None
        return part.value / whole.value

    def first_step_gap(self) -> float:
        """Return the largest difference, within a seed, of the cross-entropy at step 1: 0 if all began equal."""
        gaps = [0.0]
        for seed in self.evaluations:
            first = [float(cell.curves[seed]["ce"][0]) for cell in self.cells]
            gaps.append(max(first) - min(first))
        return max(gaps)


def figures_beside(
    results: Mapping[int, EvalResults], part: str, key: str, model: str
) -> dict[int, dict[str, Any]]:
    """Seed -> what `eval` found of a model beside its scores; seeds that were not asked for it are left out."""
    found = {seed: getattr(result, part) for seed, result in results.items()}
    return {seed: value[key][model] for seed, value in found.items() if value is not None}


def _cost(cache: str) -> tuple[float, float]:
    """Unique ids and bytes per position."""
    with CacheReader.open(cache) as reader:
        totals = reader.manifest.totals
    unique_ids, size = totals["entries_per_token"], totals["bytes_per_token"]
    assert unique_ids is not None and size is not None
    return float(unique_ids), float(size)
