"""Recipe sections `eval` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from distill_pretrain.config import Section, nameable


class GradientsConfig(Section):
    """Mean KD gradient of a student under cached targets, against the one under the whole teacher distribution."""

    model: Path
    """Run folder (or checkpoint folder) of the student whose parameters the gradients are of."""
    caches: dict[str, Annotated[str, AfterValidator(nameable)]] = Field(min_length=1)
    """Name to folder (or URL) of every cache to compare; all captured from data.tokens."""
    num_batches: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(1, 4, 16, 64), min_length=1
    )
    """Compare the gradients of the first so many micro-batches, for each of these numbers."""
    micro_batch_size: int = Field(default=8, ge=1, le=1 << 20)
    """Sequences per forward pass."""
    residual: Literal["drop", "renormalise", "label", "ghost", "uniform"] = "drop"
    """What becomes of the mass that Top-K targets lack; see objective.residual."""


class CopyingConfig(Section):
    """A probe of copying from context: random ids of the held-out text, repeated once."""

    num_sequences: int = Field(default=64, ge=1, le=1 << 20)
    """Sequences of the probe."""
    length: int | None = Field(default=None, ge=2, le=1 << 23)
    """Ids that are repeated; null takes half of data.seq_len, which is the most."""
    seed: int = Field(default=1234, ge=0, lt=1 << 64)
    """Seed of the draw."""


class EvalConfig(Section):
    """Held-out figures of trained models."""

    models: dict[str, Path] = Field(min_length=1)
    """Name to run folder (or checkpoint folder) of every model to score."""
    output: Path
    """JSON file that receives the figures."""
    num_sequences: int | None = Field(default=None, ge=1, le=1 << 40)
    """Score only the first so many held-out sequences; null scores all."""
    micro_batch_size: int = Field(default=8, ge=1, le=1 << 20)
    """Sequences per forward pass."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the models' forward pass; the teacher has its own in `teacher.dtype`."""
    head_chunk_tokens: int = Field(default=1024, ge=1, le=1 << 40)
    """Positions whose logits exist at once, of each model; the teacher has its own in `teacher.head_chunk_tokens`."""
    tensor: int = Field(default=1, ge=1, le=1 << 20)
    """Processes that split every layer of the models; need not be what they were trained with."""
    pipeline: int = Field(default=1, ge=1, le=1 << 20)
    """Processes, or groups of `tensor` of them, that hold the models' layers in turn."""
    ece_bins: int = Field(default=15, ge=1, le=1000)
    """Bins of equal width of the expected calibration error and the reliability diagram."""
    draft_lengths: tuple[Annotated[int, Field(ge=1)], ...] = (2, 4, 8)
    """Drafts per round for which the accepted length is computed (with a teacher)."""
    cache: str | None = None
    """Cache captured on data.held_out_tokens, folder or URL, to score against (needs no teacher)."""
    out_of_domain_tokens: Path | None = None
    """Prefix of a second held-out corpus, of text unlike the training text but of the same tokenizer, to score too."""
    copying: CopyingConfig | None = None
    """Also probe how well models copy from context ({} takes the defaults)."""
    gradients: GradientsConfig | None = None
    """Also compare gradients (one process; needs the section teacher)."""
    tasks: tuple[str, ...] = ()
    """Zero-shot tasks for lm-evaluation-harness: names, or paths of task YAML files."""
    tasks_path: Path | None = None
    """Folder of further task YAML files, whose names `tasks` may use."""

    _cache_can_be_named = field_validator("cache")(nameable)


class ReportConfig(Section):
    """A markdown report that compares runs."""

    runs: dict[str, Path] = Field(min_length=1)
    """Name to run folder of every training run in the loss-curve picture."""
    eval: Path
    """JSON file written by `eval`."""
    output_dir: Path
    """Folder that receives report.md and its pictures."""
    title: str = "Distillation report"
    """Heading of the report."""
