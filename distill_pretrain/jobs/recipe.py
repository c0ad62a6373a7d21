"""The recipe: every section in one place. Nothing below `jobs` sees it whole."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from distill_pretrain.checkpoint.lineage import NAME
from distill_pretrain.config import Section
from distill_pretrain.corpus.config import CorpusConfig, TokenizerConfig
from distill_pretrain.data.config import DataConfig
from distill_pretrain.eval.config import EvalConfig, ReportConfig
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.mcore.model.config import ModelConfig, OptimizerConfig, ParallelConfig
from distill_pretrain.planning.config import PlanConfig
from distill_pretrain.pruning.config import PruneConfig
from distill_pretrain.reports.comparison.config import CompareConfig
from distill_pretrain.teacher.config import CaptureConfig, TeacherConfig
from distill_pretrain.train.config import TrainConfig


class PhaseConfig(Section):
    """One phase of a run: what it sets otherwise than the phase before, section by section, as a recipe does."""

    name: str = Field(pattern=f"^{NAME}$")
    """Its folder below train.output_dir."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Of the section data."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Of the section model: rotary_base, rope_scaling_factor, dropout, and how layers are computed."""
    parallel: dict[str, Any] = Field(default_factory=dict)
    """Of the section parallel."""
    optimizer: dict[str, Any] = Field(default_factory=dict)
    """Of the section optimizer; the schedule begins with the phase."""
    objective: dict[str, Any] = Field(default_factory=dict)
    """Of the section objective."""
    teacher: dict[str, Any] = Field(default_factory=dict)
    """Of the section teacher."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Of the section train; steps are those of the phase alone, fresh_optimizer holds for it alone."""

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Section -> key -> value."""
        return {name: value for name, value in self if isinstance(value, dict) and value}


class Recipe(Section):
    """A whole job. A verb needs only some sections; it names those that are missing."""

    corpus: CorpusConfig | None = None
    """Raw text (tokenize)."""
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    """Tokenizer (tokenize)."""
    data: DataConfig | None = None
    """Tokenised corpus and cache (capture, verify, train, eval)."""
    teacher: TeacherConfig | None = None
    """Teacher (capture, eval, compare; train with objective.target: teacher)."""
    capture: CaptureConfig | None = None
    """Targets and cache layout (capture)."""
    model: ModelConfig | None = None
    """Student (train)."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """Parallel layout (train)."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """Optimizer (train)."""
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    """Loss (train)."""
    train: TrainConfig | None = None
    """Training run (train)."""
    phases: tuple[PhaseConfig, ...] = ()
    """Phases that train walks through, each from the end of the one before, in train.output_dir/NAME; none: one run."""
    eval: EvalConfig | None = None
    """Held-out evaluation (eval)."""
    report: ReportConfig | None = None
    """Comparison of runs (report)."""
    prune: PruneConfig | None = None
    """Smaller models of a trained one (prune)."""
    compare: CompareConfig | None = None
    """Students of several targets and seeds (compare)."""
    plan: PlanConfig | None = None
    """Machines, speeds and pilot for forecasts (plan, train --dry-run)."""

    @field_validator("phases")
    @classmethod
    def _have_own_names(cls, phases: tuple[PhaseConfig, ...]) -> tuple[PhaseConfig, ...]:
        names = [phase.name for phase in phases]
        if len(set(names)) < len(names):
            raise ValueError(f"two phases of one name: {', '.join(names)}")
        return phases
