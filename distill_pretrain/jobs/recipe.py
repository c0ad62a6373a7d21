"""The recipe: every section in one place. Nothing below `jobs` sees it whole."""

from __future__ import annotations

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


class Recipe(Section):
    """A whole job. A verb needs only some sections; it names those that are missing."""

    corpus: CorpusConfig | None = None
    """Raw text (tokenize)."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Tokenizer (tokenize)."""
    data: DataConfig | None = None
    """Tokenised corpus and cache (capture, verify, train, eval)."""
    teacher: TeacherConfig | None = None
    """Teacher (capture, eval, compare; train with objective.target: teacher)."""
    capture: CaptureConfig | None = None
    """Targets and cache layout (capture)."""
    model: ModelConfig | None = None
    """Student (train)."""
    parallel: ParallelConfig = ParallelConfig()
    """Parallel layout (train)."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer (train)."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Loss (train)."""
    train: TrainConfig | None = None
    """Training run (train)."""
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
