"""The report of a comparison: report.md and its pictures. Every figure and verdict in it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_pretrain.eval.heldout import TEACHER
from distill_pretrain.files.atomic import publish_bytes
from distill_pretrain.reports.comparison.journal import Stage
from distill_pretrain.reports.comparison.orderings import orderings, own_orderings
from distill_pretrain.reports.comparison.picture import draw_losses, reliability_choice
from distill_pretrain.reports.comparison.results import (
    CellResults,
    Comparison,
    Mean,
    figures_beside,
    mean_over_seeds,
)
from distill_pretrain.reports.picture import draw_reliability
from distill_pretrain.reports.report import installed_versions, today

REPORT = "report.md"
_ABSENT = "–"
_NATS = "nats per token"


def write_comparison(
    comparison: Comparison, folder: Path, *, title: str, command: str, stages: Sequence[Stage]
) -> Path:
    """Writes report.md and its pictures.

    Args:
        comparison: the figures.
        folder: that receives them; created.
        title: heading.
        command: that repeats the comparison.
        stages: what was done when, where and for how long.

    Returns:
        Path of report.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(comparison)
    for name, draw in pictures.items():
        publish_bytes(folder / f"{name}.png", draw())
    lines = [f"# {title}", "", *_setting(comparison), "", "## Cells", "", *_cells_table(comparison)]
    for cells in comparison.fixes().values():
        lines += [
            "",
            f"## The missing mass, at {_number(cells[0].unique_ids, '.1f')} unique ids",
            "",
        ]
        lines += _fixes_table(comparison, cells)
    if comparison.sampled:
        lines += ["", "## Sampled targets", "", *_sampled_table(comparison)]
    lines += ["", "## Differences per seed", "", *_paired_table(comparison)]
    lines += _elsewhere(comparison)
    lines += ["", "## Which of the paper's orderings hold here", "", *_orderings(comparison)]
    lines += ["", "## Pictures", ""]
    for name, alternative in _ALTERNATIVES.items():
        if name in pictures:
            lines += [f"![{alternative}]({name}.png)", ""]
    lines += ["## How it was made", "", *_provenance(comparison, command, stages)]
    path = folder / REPORT
    publish_bytes(path, ("\n".join(lines) + "\n").encode())
    return path


_ALTERNATIVES = {
    "loss_unique_ids": "Held-out cross-entropy against unique ids per token",
    "loss_bytes": "Held-out cross-entropy against bytes per token",
    "kl_unique_ids": "KL of teacher and student against unique ids per token",
    "reliability": "Reliability diagrams, first seed",
}


def _pictures(c: Comparison) -> dict[str, Callable[[], bytes]]:
    loss, divergence = f"held-out cross-entropy ({_NATS})", f"KL(teacher‖student) ({_NATS})"

    def ids(cell: CellResults) -> float | None:
        return cell.unique_ids

    def size(cell: CellResults) -> float | None:
        return cell.bytes_per_token

    found: dict[str, Callable[[], bytes]] = {}
    if any(cell.unique_ids is not None for cell in c.cells):
        ids_label, size_label = "unique ids per token", "bytes per token"
        found["loss_unique_ids"] = lambda: draw_losses(
            c, field="ce", y_label=loss, cost=ids, x_label=ids_label
        )
        found["loss_bytes"] = lambda: draw_losses(
            c, field="ce", y_label=loss, cost=size, x_label=size_label
        )
        found["kl_unique_ids"] = lambda: draw_losses(
            c, field="kl", y_label=divergence, cost=ids, x_label=ids_label
        )
    if reliability_choice(c):
        found["reliability"] = lambda: draw_reliability(reliability_choice(c))
    return found


def _setting(c: Comparison) -> list[str]:
    seeds, teacher = list(c.evaluations), c.teacher
    curve = c.cells[0].curves[seeds[0]]
    gap = c.first_step_gap()
    start = "equal in every cell of a seed" if gap == 0 else f"**not equal**: up to {gap:.2e} apart"
    return [
        f"{len(c.cells)} cells x {len(seeds)} seeds ({', '.join(map(str, seeds))}), {curve['step'][-1]:,.0f} steps and "
        f"{curve['tokens'][-1]:,.0f} tokens each. The cells of a seed have the same initial weights and batches: their "
        f"cross-entropy at the first step is {start}.",
        "",
        f"Held-out figures over {teacher['num_positions']:,} positions. The teacher's cross-entropy there is "
        f"{teacher['ce']:.4f} {_NATS}"
        + (f", its ECE {teacher['ece']:.2%}." if teacher.get("ece") is not None else "."),
        "",
        "a ± b: mean and standard deviation over seeds. % of gain: how far the mean loss went from CE's to FullKD's.",
    ]


def _cells_table(c: Comparison) -> list[str]:
    head = [
        "cell",
        "unique ids/token",
        "bytes/token",
        "held-out CE",
        "% of gain",
        "KL(teacher‖student)",
        "ECE %",
        "acceptance %",
        "tokens/s",
    ]
    rows = [
        [
            cell.name,
            "all" if cell.spec.online else _number(cell.unique_ids, ".2f"),
            _number(cell.bytes_per_token, ".1f"),
            _mean(cell.mean("ce"), ".4f"),
            _number(c.gain(cell), ".0f", scale=100),
            _mean(cell.mean("kl"), ".4f"),
            _mean(cell.mean("ece"), ".2f", scale=100),
            _mean(cell.mean("acceptance"), ".2f", scale=100),
            _number(cell.tokens_per_second, ",.0f"),
        ]
        for cell in c.cells
    ]
    return [
        *_table(head, rows),
        "",
        "tokens/s: median over all steps, the whole job's. Acceptance: mean probability that the teacher accepts a "
        "token drafted by the student (speculative decoding).",
    ]


def _fixes_table(c: Comparison, cells: Sequence[CellResults]) -> list[str]:
    rows = [
        [
            cell.spec.residual or cell.name,
            _mean(cell.mean("ce"), ".4f"),
            _number(c.gain(cell), ".0f", scale=100),
            _mean(cell.mean("kl"), ".4f"),
            _mean(cell.mean("ece"), ".2f", scale=100),
        ]
        for cell in [*filter(None, (c.text_only, c.full)), *cells]
    ]
    return _table(["missing mass", "held-out CE", "% of gain", "KL", "ECE %"], rows)


def _sampled_table(c: Comparison) -> list[str]:
    rows = [
        [
            cell.spec.sampler or _ABSENT,
            str(cell.spec.num_draws),
            _number(cell.unique_ids, ".2f"),
            _mean(cell.mean("ce"), ".4f"),
            _number(c.gain(cell), ".0f", scale=100),
            _mean(cell.mean("kl"), ".4f"),
            _mean(cell.mean("ece"), ".2f", scale=100),
            _mean(cell.mean("acceptance"), ".2f", scale=100),
        ]
        for cell in c.sampled
    ]
    head = ["sampler", "draws", "unique ids/token", "held-out CE", "% of gain", "KL", "ECE %"]
    return _table([*head, "acceptance %"], rows)


def _paired_table(c: Comparison) -> list[str]:
    levels = [level for level in (c.text_only, c.full) if level is not None]
    if not levels:
        return ["There is neither a CE nor a FullKD cell to compare with."]
    head = ["cell"]
    for level in levels:
        head += [f"CE minus {level.name}'s", f"KL minus {level.name}'s"]
    rows = []
    for cell in c.cells:
        row = [cell.name]
        for level in levels:
            for field in ("ce", "kl"):
                gap = None if cell is level else cell.minus(level, field)
                row.append(_difference(gap))
        rows.append(row)
    return [
        *_table(head, rows),
        "",
        f"{_NATS}; a ± b: mean of the differences per seed and its standard error over n = {len(c.evaluations)} seeds.",
    ]


def _elsewhere(c: Comparison) -> list[str]:
    """The section on the second held-out text and the copying probe, where any cell was asked."""
    if not any(cell.elsewhere or cell.copying for cell in c.cells):
        return []
    once = dict([next(iter(c.evaluations.items()))])  # the teacher is the same for every seed
    teacher = _elsewhere_row(
        TEACHER,
        figures_beside(once, "out_of_domain", "scores", TEACHER),
        figures_beside(once, "copying", "models", TEACHER),
    )
    rows = [
        teacher,
        *(_elsewhere_row(cell.name, cell.elsewhere, cell.copying) for cell in c.cells),
    ]
    head = ["cell", "CE, other text", "KL, other text", "ECE %, other text"]
    return [
        "",
        "## Out of domain, and copying from context",
        "",
        *_table([*head, "CE of random ids", "CE of their copy", "copied %"], rows),
        "",
        "The other text is eval.out_of_domain_tokens. Random ids of the held-out text come once more in the same "
        "order: a model that copies from its context predicts them the second time.",
    ]


def _elsewhere_row(
    name: str, text: Mapping[int, dict[str, Any]], copying: Mapping[int, dict[str, Any]]
) -> list[str]:
    return [
        name,
        _mean(mean_over_seeds(text, "ce"), ".4f"),
        _mean(mean_over_seeds(text, "kl"), ".4f"),
        _mean(mean_over_seeds(text, "ece"), ".2f", scale=100),
        _mean(mean_over_seeds(copying, "first"), ".4f"),
        _mean(mean_over_seeds(copying, "repeated"), ".4f"),
        _mean(mean_over_seeds(copying, "accuracy"), ".2f", scale=100),
    ]


def _orderings(c: Comparison) -> list[str]:
    paper, own = orderings(c), own_orderings(c)
    lines = [f"- {ordering.line()}" for ordering in paper] or [
        "None can be tested with these cells."
    ]
    if own:
        lines += [
            "",
            "This project's own claim:",
            "",
            *(f"- {ordering.line()}" for ordering in own),
        ]
    verdicts = [ordering.verdict for ordering in paper]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("yes", "no", "not resolved"))
    return [
        *lines,
        "",
        f"Of the paper's {len(paper)}: {counts}. Not resolved: a difference whose 95% interval over "
        "seeds (Student's t) holds 0. Each is judged alone: of 20 true zeros one would pass.",
    ]


def _provenance(c: Comparison, command: str, stages: Sequence[Stage]) -> list[str]:
    lines = [
        f"- Report: {today()}. Repeat: `{command}`; settings in full: `recipe.yaml` beside this file."
    ]
    versions = {text for stage in stages for text in [_versions(stage.software)]} or {
        _versions(installed_versions())
    }
    lines += [f"- Versions: {text}." for text in sorted(versions)]
    machines = {f"{stage.hardware}; {stage.processes} processes" for stage in stages}
    lines += [f"- On: {text}." for text in sorted(machines)]
    times: dict[str, float] = {}
    for stage in stages:
        # "train ce, seed 1" and "evaluate seed 1" are parts of one kind of work; the teacher is another.
        kind = stage.name if "teacher" in stage.name else stage.name.split()[0]
        times[kind] = times.get(kind, 0.0) + stage.seconds
    if times:
        parts = ", ".join(f"{kind} {_duration(seconds)}" for kind, seconds in times.items())
        lines.append(
            f"- Time: {_duration(sum(times.values()))} in all ({parts}); work lost to kills not counted, "
            "jobs side by side added up."
        )
    return lines


def _versions(software: dict[str, str]) -> str:
    return ", ".join(f"{name} {text}" for name, text in software.items())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|:--" + "|--:" * (len(head) - 1) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def _mean(mean: Mean | None, form: str, *, scale: float = 1.0) -> str:
    if mean is None:
        return _ABSENT
    text = format(scale * mean.value, form)
    return text if mean.spread is None else f"{text} ± {format(scale * mean.spread, form)}"


def _difference(mean: Mean | None) -> str:
    if mean is None:
        return _ABSENT
    text = format(mean.value, "+.4f")
    return text if mean.error is None else f"{text} ± {mean.error:.4f}"


def _number(value: float | None, form: str, *, scale: float = 1.0) -> str:
    return _ABSENT if value is None else format(scale * value, form)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
