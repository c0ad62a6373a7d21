"""Sections of a report below its first table: each a list of markdown lines, empty where there is nothing to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill_pretrain.reports.results import EvalResults

AllScores = Mapping[str, Mapping[str, Any]]
"""Name of the model -> `ModelScores.as_dict()`."""

ABSENT = "–"
_CACHE_KEYS = ("cross_entropy_cache", "kl_cache")


def figure(value: float | None, form: str) -> str:
    """Write a number, or a dash for None."""
    return ABSENT if value is None else format(value, form)


def escape(text: str) -> str:
    """Escape text so that it does not end a table's cell."""
    return text.replace("|", "\\|")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Write a markdown table: names on the left, figures on the right."""
    lines = [
        "| " + " | ".join(map(escape, header)) + " |",
        "|:--" + "|--:" * (len(header) - 1) + "|",
    ]
    return lines + ["| " + " | ".join(map(escape, row)) + " |" for row in rows]


def calibration(scores: AllScores, picture: str) -> list[str]:
    """Write the reliability diagram, if any model has one."""
    if not any(score["reliability"] for score in scores.values()):
        return []
    return [
        "## Calibration",
        "",
        f"![Accuracy of the likeliest token against its probability]({picture})",
        "",
        "ECE is the mean distance of the line from the diagonal, weighted by positions.",
        "",
    ]


def speculation(scores: AllScores) -> list[str]:
    """Write the accepted drafts per round of every model but the teacher."""
    drafters = {
        name: score["accepted_length"] for name, score in scores.items() if score["accepted_length"]
    }
    if not drafters:
        return []
    lengths = list(dict.fromkeys(k for accepted in drafters.values() for k in accepted))
    lines = markdown_table(
        ["drafts per round", *lengths],
        [[name, *(figure(a.get(k), ".2f") for k in lengths)] for name, a in drafters.items()],
    )
    return [
        "## Drafting for the teacher",
        "",
        *lines,
        "",
        "Drafts that the teacher is expected to accept per round of speculative decoding, without the token it adds "
        "itself; at positions of the held-out text, not of text the student wrote. Acceptance in the first table is "
        "the mean probability that it accepts a single draft.",
        "",
    ]


def held_out_cache(scores: AllScores) -> list[str]:
    """Write the figures against a held-out cache."""
    rows = [
        [name, *(figure(score[key], ".4f") for key in _CACHE_KEYS)]
        for name, score in scores.items()
        if score["kl_cache"] is not None
    ]
    if not rows:
        return []
    lines = markdown_table(["model", "CE(cache, model)", "KL(cache‖model)"], rows)
    return [
        "## Against the held-out cache",
        "",
        *lines,
        "",
        "Over the stored ids, nats per token. For sampled targets the cross-entropy is an unbiased estimate of that of "
        "the teacher; the KL is too high, by the same amount for every model. Top-k targets leave out what was not "
        "stored.",
        "",
    ]


def out_of_domain(results: EvalResults) -> list[str]:
    """Write the figures on the second held-out text."""
    if results.out_of_domain is None:
        return []
    forms = (("ce", ".4f"), ("kl", ".4f"), ("top1_agreement", ".1%"), ("ece", ".2%"))
    scores = results.out_of_domain["scores"]
    rows = [
        [name, *(figure(score[key], form) for key, form in forms)] for name, score in scores.items()
    ]
    positions = next(iter(scores.values()))["num_positions"]
    header = ["model", "CE", "KL(teacher‖model)", "top-1 agreement", "ECE"]
    return [
        "## Out of domain",
        "",
        *markdown_table(header, rows),
        "",
        f"On {positions:,} positions of a second held-out text.",
        "",
    ]


def copying(results: EvalResults) -> list[str]:
    """Write the losses on random ids when they come first and when they come again."""
    if results.copying is None:
        return []
    inputs = results.copying["inputs"]
    rows = []
    for name, found in results.copying["models"].items():
        error = found["repeated_standard_error"]
        margin = "" if error is None else f" ± {error:.4f}"
        rows.append(
            [
                name,
                f"{found['first']:.4f}",
                f"{found['repeated']:.4f}{margin}",
                f"{found['repeated'] - found['first']:+.4f}",
                f"{found['accuracy']:.1%}",
                figure(found["kl"], ".4f"),
            ]
        )
    header = ["model", "CE, first time", "CE, repeated", "difference", "copied", "KL, repeated"]
    return [
        "## Copying from context",
        "",
        *markdown_table(header, rows),
        "",
        f"{inputs['num_sequences']:,} sequences of {inputs['length']:,} different ids of the held-out text in random "
        "order, which then come once more: a model that copies from its context predicts them the second time. Copied: "
        "share of the repeated ids that were the likeliest.",
        "",
    ]


def gradients(results: EvalResults) -> list[str]:
    """Write the angle and size of cached targets' gradients."""
    if results.gradients is None:
        return []
    rows = [
        [
            name,
            f"{row['num_positions']:,}",
            figure(row["angle_degrees"], ".1f"),
            figure(row["norm_ratio"], ".3f"),
        ]
        for name, found in results.gradients["caches"].items()
        for row in found
    ]
    return [
        "## Gradients against FullKD",
        "",
        *markdown_table(["cache", "positions", "angle (degrees)", "norm ratio"], rows),
        "",
        "Mean gradient of KL(target‖student) by all parameters, cached targets against the teacher's whole "
        "distribution, on the same positions. An angle that falls with more positions is noise, one that stays "
        "is bias.",
        "",
    ]


def tasks(results: EvalResults) -> list[str]:
    """Write the zero-shot figures, tasks down and models across."""
    if results.tasks is None:
        return []
    models = results.tasks["models"]
    keys = dict.fromkeys(
        (task, metric)
        for found in models.values()
        for task, metrics in found.items()
        for metric in metrics
        if "_stderr" not in metric
    )
    rows = []
    for task, metric in keys:
        cells = [f"{task}, {metric}"]
        for found in models.values():
            metrics = found.get(task, {})
            error = metrics.get(f"{metric}_stderr")
            margin = "" if error is None else f" ± {error:.4f}"
            cells.append(figure(metrics.get(metric), ".4f") + margin)
        rows.append(cells)
    return ["## Zero-shot tasks", "", *markdown_table(["task", *models], rows), ""]
