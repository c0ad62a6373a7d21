"""A markdown report that compares training runs: tables, the measured differences, pictures.

Everything in it is read from metrics.jsonl, recipe.yaml and the figures of `eval`; nothing is judged.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from distill_pretrain.errors import ConfigError
from distill_pretrain.eval.config import ReportConfig
from distill_pretrain.eval.heldout import TEACHER
from distill_pretrain.files.atomic import publish_bytes
from distill_pretrain.reports import sections
from distill_pretrain.reports.curves import TrainingCurve
from distill_pretrain.reports.picture import draw_curves, draw_reliability, require_matplotlib
from distill_pretrain.reports.results import EvalResults

REPORT, PICTURE, RELIABILITY = "report.md", "loss.png", "reliability.png"
FINAL_STEPS = 20
"""The final training CE is the mean over so many last steps."""

_COMPARED = (
    ("ce", "held-out CE"),
    ("kl", "KL(teacher‖model)"),
    ("cross_entropy_cache", "CE(cache, model)"),
)
_COLUMNS = (
    "model",
    "steps",
    "tokens seen",
    "final train CE",
    "held-out CE",
    "perplexity",
    "ECE",
    "KL(teacher‖model)",
    "top-1 agreement",
    "acceptance",
    "median tokens/s",
)


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One model: its training curve, its held-out figures, or both.

    Attributes:
        name: of the model.
        curve: of its run; None where report.runs does not list it.
        scores: `ModelScores.as_dict()`; None where `eval` did not score it.
        is_teacher: whether the KL was taken against this model.
    """

    name: str
    curve: TrainingCurve | None
    scores: dict[str, Any] | None
    is_teacher: bool

    @property
    def final_ce(self) -> float | None:
        """The mean training CE over the last `FINAL_STEPS` steps, nats per token."""
        return None if self.curve is None else float(np.nanmean(self.curve["ce"][-FINAL_STEPS:]))

    def cells(self) -> list[str]:
        """Return the row's text, in the order of the table's columns."""
        training = [sections.ABSENT] * 3
        speed = sections.ABSENT
        if self.curve is not None:
            steps, tokens = self.curve["step"][-1], self.curve["tokens"][-1]
            training = [f"{steps:,.0f}", f"{tokens:,.0f}", f"{self.final_ce:.4f}"]
            speed = f"{np.median(self.curve['tokens_per_second']):,.0f}"
        scores = self.scores or {}
        # Beside itself the teacher says nothing.
        compared = {} if self.is_teacher else scores
        return [
            f"{self.name} (teacher)" if self.is_teacher and self.name != TEACHER else self.name,
            *training,
            sections.figure(scores.get("ce"), ".4f"),
            sections.figure(scores.get("perplexity"), ",.3f"),
            sections.figure(scores.get("ece"), ".2%"),
            sections.figure(compared.get("kl"), ".4f"),
            sections.figure(compared.get("top1_agreement"), ".1%"),
            sections.figure(compared.get("acceptance"), ".1%"),
            speed,
        ]


def write_report(config: ReportConfig, *, recipe: str | None = None) -> Path:
    """Writes report.md, loss.png and, where the figures have it, reliability.png into `output_dir`.

    Args:
        config: runs, figures, folder, title.
        recipe: path of the recipe the report was made with, to be named in it.

    Returns:
        Path of report.md.

    Raises:
        MissingDependency: matplotlib is not installed.
        RunLogError: a run's metrics.jsonl is missing or damaged.
        EvalFileError: the figures of `eval` are missing or damaged.
        ConfigError: no run is among the models that `eval` scored.
    """
    require_matplotlib()
    results = EvalResults.load(config.eval)
    curves = {name: TrainingCurve.load(folder) for name, folder in config.runs.items()}
    rows = _rows(config, curves, results)
    baseline = _baseline(rows)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    scored = {row.name: row.scores for row in rows if row.scores is not None}
    teachers = {row.name for row in rows if row.is_teacher}
    held_out = {name: scores["ce"] for name, scores in scored.items()}
    publish_bytes(config.output_dir / PICTURE, draw_curves(curves, held_out=held_out))
    if any(scores["reliability"] for scores in scored.values()):
        publish_bytes(config.output_dir / RELIABILITY, draw_reliability(scored))
    lines = [
        f"# {config.title}",
        "",
        *_table(rows),
        "",
        *_notes(rows, results),
        "",
        "## Measured differences",
        "",
        *_differences(rows, baseline, results),
        "",
        *sections.calibration(scored, RELIABILITY),
        *sections.speculation({k: v for k, v in scored.items() if k not in teachers}),
        *sections.held_out_cache(scored),
        *sections.out_of_domain(results),
        *sections.copying(results),
        *sections.gradients(results),
        *sections.tasks(results),
        "## Training curves",
        "",
        f"![Training cross-entropy against step]({PICTURE})",
        "",
        "Every run's cross-entropy with the true next token, also where the run minimised something else: "
        "faint as logged, bold averaged over neighbouring steps.",
        "",
        "## How it was made",
        "",
        *_provenance(config, results, curves, recipe),
    ]
    path = config.output_dir / REPORT
    publish_bytes(path, ("\n".join(lines) + "\n").encode())
    return path


def installed_versions() -> dict[str, str]:
    """Return the versions of what decides the figures."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("distill-pretrain", "torch", "megatron-core", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def today() -> str:
    """Return the time now, ISO 8601, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _rows(
    config: ReportConfig, curves: dict[str, TrainingCurve], results: EvalResults
) -> list[ReportRow]:
    """The teacher first, then report.runs in order, then what only `eval` knows."""
    teacher = _teacher_name(config, results)
    names = list(dict.fromkeys([*curves, *results.scores]))
    if teacher is not None and teacher != TEACHER and TEACHER in names:
        names.remove(TEACHER)  # the same model under its own name
    if not set(curves) & (set(results.scores) | {teacher}):
        raise ConfigError(
            "no training run is among the models that were scored",
            where="report.runs",
            found=", ".join(curves),
            expected=f"names out of: {', '.join(results.scores)} (in {config.eval})",
            remedy="use the names of eval.models in report.runs",
        )
    rows = [
        ReportRow(
            name=name,
            curve=curves.get(name),
            scores=results.scores.get(TEACHER if name == teacher else name),
            is_teacher=name == teacher,
        )
        for name in names
    ]
    return sorted(rows, key=lambda row: not row.is_teacher)


def _teacher_name(config: ReportConfig, results: EvalResults) -> str | None:
    """The name the teacher goes by in report.runs, or "teacher", or None where there was none."""
    teacher = results.inputs.get("teacher")
    if TEACHER not in results.scores or not isinstance(teacher, dict):
        return None
    if TEACHER in config.runs:
        return TEACHER
    path = Path(str(teacher.get("path"))).absolute()
    return next((n for n, folder in config.runs.items() if folder.absolute() == path), TEACHER)


def _baseline(rows: list[ReportRow]) -> ReportRow | None:
    """The first scored run that trained on the text alone; else the first scored model but the teacher."""
    students = [row for row in rows if row.scores is not None and not row.is_teacher]
    plain = [row for row in students if row.curve is not None and not row.curve.has_kl]
    return next(iter([*plain, *students]), None)


def _table(rows: list[ReportRow]) -> list[str]:
    return sections.markdown_table(_COLUMNS, [row.cells() for row in rows])


def _notes(rows: list[ReportRow], results: EvalResults) -> list[str]:
    scored = next(iter(results.scores.values()))
    lines = [
        f"CE and KL in nats per token, perplexity = exp(held-out CE). Held-out figures over "
        f"{scored['num_positions']:,} positions in {scored['num_sequences']:,} held-out "
        f"sequences; ECE is the calibration error of the likeliest token; final train CE is the mean of the last "
        f"{FINAL_STEPS} steps (or of all, if fewer).",
    ]
    entropy = scored["teacher_entropy"]
    if entropy is not None:
        lines[0] += f" The teacher's mean entropy there is {entropy:.4f}."
    cut_off = [row.name for row in rows if row.curve is not None and row.curve.cut_off]
    if cut_off:
        lines += ["", f"The log of {_and(cut_off)} ends in an incomplete line, which is left out."]
    return lines


def _differences(
    rows: list[ReportRow], baseline: ReportRow | None, results: EvalResults
) -> list[str]:
    others = [
        row for row in rows if row.scores is not None and not row.is_teacher and row != baseline
    ]
    if baseline is None or not others:
        return ["There is no second student to compare with."]
    lines = []
    for row in others:
        pair = results.paired.get(row.name, {}).get(baseline.name, {})
        parts = [
            f"{label} is {_change(pair[field])}" for field, label in _COMPARED if field in pair
        ]
        steps = ""
        if row.curve is not None and baseline.curve is not None:
            mine, theirs = row.curve["step"][-1], baseline.curve["step"][-1]
            steps = f" ({mine:,.0f} steps against {theirs:,.0f})"
        text = _and(parts) if parts else "was not scored on the same positions"
        lines.append(
            f"- **{sections.escape(row.name)}** against **{sections.escape(baseline.name)}**{steps}: {text}."
        )
    lines += [
        "",
        "± is one standard error of the difference on the same positions, sequences taken as independent; it "
        "does not cover other seeds or other data.",
    ]
    return lines


def _change(pair: dict[str, Any]) -> str:
    difference, error = pair["difference"], pair["standard_error"]
    word = "lower" if difference < 0 else "higher"
    margin = "" if error is None else f" ± {error:.4f}"
    return f"{abs(difference):.4f}{margin} nats per token {word}"


def _provenance(
    config: ReportConfig,
    results: EvalResults,
    curves: dict[str, TrainingCurve],
    recipe: str | None,
) -> list[str]:
    recipes = [f"`{folder / 'recipe.yaml'}`" for folder in config.runs.values()]
    made_with = f", recipe `{recipe}`" if recipe else ""
    found = {**installed_versions(), **{f"{k} (at eval)": v for k, v in _changed(results).items()}}
    return [
        f"- Report: {today()}{made_with}; figures: `{config.eval}`, {results.date}.",
        f"- Runs: {', '.join(recipes)}.",
        "- Versions: " + ", ".join(f"{name} {text}" for name, text in found.items()) + ".",
    ]


def _changed(results: EvalResults) -> dict[str, str]:
    """Versions at evaluation that are not those of the report."""
    now = installed_versions()
    return {name: text for name, text in results.software.items() if now.get(name) != text}


def _and(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
