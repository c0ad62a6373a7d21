"""Tables, verdicts and the figure of `study_depth.py`, from its finished cells."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from reporting import environment, write_json

COLOURS = {
    "deepscale": "#0072B2",
    "fan_in": "#D55E00",
    "completep": "#009E73",
    "xavier": "#CC79A7",
    "megatron": "#000000",
}
RIVALS = ("megatron", "fan_in", "completep")
"""What `deepscale` is compared with, seed by seed."""

SHARED_STEPS = slice(40, 60)
"""Of the training losses compared over depth: steps that students of every depth take."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Mean:
    """Of seeds.

    Attributes:
        value: nats per token; NaN if a run did not end with a number.
        error: standard error of the mean; None for one seed.
        count: seeds.
    """

    value: float
    error: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Mean:
        """Of the values of some seeds, None where a run diverged."""
        numbers = np.array([math.nan if value is None else value for value in values])
        spread = numbers.std(ddof=1) / math.sqrt(len(numbers)) if len(numbers) > 1 else None
        return cls(float(numbers.mean()), None if spread is None else float(spread), len(numbers))

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "diverged"
        if self.error is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ± {self.error:.3f}"

    def signed(self) -> str:
        """As a difference."""
        return f"+{self}" if self.value > 0 else str(self)

    def is_clearly(self, sign: int) -> bool:
        """Above (1) or below (-1) zero by three standard errors, seen in more than one seed."""
        return self.error is not None and sign * self.value > 3 * self.error


class Study:
    """The finished cells.

    Args:
        records: of `Cell`s and what became of them.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)

    def values(self, figure: str = "held_out_ce", **cell: Any) -> dict[int, float | None]:
        """A figure by seed, of the cells that are so."""
        wanted = {"objective": "ce", "hidden": 64, **cell}
        return {
            record["seed"]: _figure(record, figure)
            for record in self.records
            if all(record[name] == value for name, value in wanted.items())
        }

    def mean(self, figure: str = "held_out_ce", **cell: Any) -> Mean | None:
        """Over the seeds that were run; None if none was."""
        found = self.values(figure, **cell)
        return Mean.of(list(found.values())) if found else None

    def difference(self, one: Record, other: Record) -> Mean | None:
        """Of the held-out losses of two kinds of cells, over the seeds both have: a seed is one order of the text."""
        ours, theirs = self.values(**one), self.values(**other)
        seeds = sorted(set(ours) & set(theirs))
        if not seeds:
            return None
        pairs = [(ours[seed], theirs[seed]) for seed in seeds]
        return Mean.of([None if None in pair else pair[0] - pair[1] for pair in pairs])

    def every(self, name: str, **cell: Any) -> list[Any]:
        """Values of a setting, in order."""
        wanted = {"objective": "ce", "hidden": 64, **cell}
        found = {
            record[name]
            for record in self.records
            if all(record[key] == value for key, value in wanted.items())
        }
        return sorted(found, key=list(COLOURS).index if name == "init" else None)

    def best_rate(self, depth: int, init: str) -> float | None:
        """The rate of the lowest held-out loss of seed 1, if there are at least two to choose from."""
        found = {lr: self.values(depth=depth, init=init, lr=lr).get(1) for lr in self.every("lr")}
        sound = {lr: value for lr, value in found.items() if value is not None}
        return min(sound, key=lambda lr: sound[lr]) if len(sound) > 1 else None


def _figure(record: Record, name: str) -> float | None:
    if name != "shared_ce":
        return record[name]
    losses = record["curve"][SHARED_STEPS]
    return float(np.mean(losses)) if len(losses) == 20 and None not in losses else None


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|--:" + "|:--" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _shown(found: object) -> str:
    return "–" if found is None else str(found)


def rates_table(study: Study) -> str:
    """Held-out loss of every depth, initialisation and rate."""
    rates, rows = study.every("lr"), []
    for depth in study.every("depth"):
        for init in study.every("init", depth=depth):
            means = {lr: study.mean(depth=depth, init=init, lr=lr) for lr in rates}
            best = study.best_rate(depth, init)
            shown = [f"**{means[lr]}**" if lr == best else _shown(means[lr]) for lr in rates]
            rows.append([str(depth), f"`{init}`", *shown])
    return _table(["layers", "init", *(f"lr {lr:g}" for lr in rates)], rows)


def claims_table(study: Study) -> str:
    """Deepscale against the others, seed by seed."""
    rows = []
    for depth in study.every("depth"):
        for lr in study.every("lr", depth=depth):
            found = [_against(study, other, depth, lr, lr) for other in RIVALS]
            if any(found):
                shown = [mean and f"{mean.signed()} ({mean.count})" for mean in found]
                rows.append([str(depth), f"{lr:g}", *map(_shown, shown)])
    return _table(["layers", "lr", *(f"less `{other}` (seeds)" for other in RIVALS)], rows)


def depth_table(study: Study, lr: float) -> str:
    """Training loss of the shared steps over depth."""
    depths, inits = study.every("depth", lr=lr), study.every("init", lr=lr)
    rows = [
        [str(depth), *(_shown(study.mean("shared_ce", depth=depth, init=i, lr=lr)) for i in inits)]
        for depth in depths
    ]
    return _table(["layers", *(f"`{init}`" for init in inits)], rows)


def _against(study: Study, other: str, depth: int, lr: float, others_lr: float) -> Mean | None:
    """Deepscale's held-out loss less another's."""
    return study.difference(
        {"init": "deepscale", "depth": depth, "lr": lr},
        {"init": other, "depth": depth, "lr": others_lr},
    )


def others_table(study: Study) -> str:
    """Distilled students, and wide ones."""
    rows = []
    for objective, hidden, what in (("kd", 64, "distilled"), ("ce", 256, "text, width 256")):
        for depth in study.every("depth", objective=objective, hidden=hidden):
            kind: dict[str, Any] = {"objective": objective, "hidden": hidden, "depth": depth}
            for lr in study.every("lr", **kind):
                for init in study.every("init", lr=lr, **kind):
                    mean = study.mean(init=init, lr=lr, **kind)
                    assert mean is not None
                    rows.append(
                        [str(depth), what, f"`{init}`", f"{lr:g}", str(mean), str(mean.count)]
                    )
    return _table(["layers", "trained on", "init", "lr", "held-out", "seeds"], rows)


def verdicts(study: Study) -> list[str]:
    """What the study was to find out, and what it found."""
    lines = []
    for depth in study.every("depth"):
        if depth < 96:
            continue
        for other in RIVALS:
            for lr in study.every("lr", depth=depth):
                mean = _against(study, other, depth, lr, lr)
                if mean is not None:
                    lines.append(_line(f"{depth} layers, lr {lr:g}", mean, other))
            ours, theirs = (study.best_rate(depth, init) for init in ("deepscale", other))
            if ours is not None and theirs is not None:
                mean = _against(study, other, depth, ours, theirs)
                assert mean is not None
                where = f"{depth} layers, each at its best rate ({ours:g} and {theirs:g})"
                lines.append(_line(where, mean, other))
    for init in study.every("init"):
        best = {d: study.best_rate(d, init) for d in study.every("depth", init=init)}
        found = {depth: lr for depth, lr in best.items() if lr is not None}
        if len(found) > 1:
            named = ", ".join(
                f"{lr:g}{_edge(study, depth, init, lr)} at {depth} layers"
                for depth, lr in found.items()
            )
            stays = "stays put" if len(set(found.values())) == 1 else "moves"
            lines.append(f"- Best rate of `{init}` {stays}: {named}.")
    return lines


def _edge(study: Study, depth: int, init: str, lr: float) -> str:
    """Where the best rate has no neighbour on one side."""
    tried = study.every("lr", depth=depth, init=init)
    ends = {tried[0]: " (the lowest tried)", tried[-1]: " (the highest tried)"}
    return ends.get(lr, "")


def _line(where: str, mean: Mean, other: str) -> str:
    found = f"{mean.signed()} nats per token, {_seeds(mean.count)}"
    return f"- {where}: `deepscale` {_verdict(mean)} `{other}` ({found})."


def _verdict(mean: Mean) -> str:
    if math.isnan(mean.value):
        return "cannot be compared, a run having diverged, with"
    if mean.is_clearly(-1):
        return "**is better than**"
    if mean.is_clearly(1):
        return "**is worse than**"
    if mean.error is None:
        return "is lower than" if mean.value < 0 else "is not lower than"
    return "cannot be told from"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def draw(study: Study) -> bytes:
    """Training loss of the shared steps over depth, a panel per rate and a line per initialisation: a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rates = [lr for lr in study.every("lr") if len(study.every("init", lr=lr)) > 1]
    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    for panel, lr in zip(panels, rates, strict=True):
        depths = [depth for depth in study.every("depth", lr=lr) if depth >= 12]
        for init in study.every("init", lr=lr):
            found = {d: study.values("shared_ce", depth=d, init=init, lr=lr) for d in depths}
            means = {d: Mean.of(list(seeds.values())).value for d, seeds in found.items() if seeds}
            colour = COLOURS[init]
            panel.plot(list(means), list(means.values()), "-o", color=colour, label=init, ms=4)
            for depth, seeds in found.items():
                sound = [value for value in seeds.values() if value is not None]
                panel.plot([depth] * len(sound), sound, ".", color=colour, alpha=0.5, ms=4)
        panel.set_xscale("log", base=2)
        panel.set_xticks(depths, [str(depth) for depth in depths])
        panel.minorticks_off()
        panel.set_title(f"learning rate {lr:g}", fontsize=10)
        panel.set_xlabel("layers")
        panel.grid(color="#dddddd", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("training cross-entropy, steps 41 to 60\n(nats per token; dots: seeds)")
    lines = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    shown = {init: lines[init] for init in reversed(COLOURS) if init in lines}
    figure.legend(list(shown.values()), list(shown), loc="outside right upper", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def write_report(records: Sequence[Record], planned: int, folder: Path) -> None:
    """report.md, study.json and loss_over_depth.png.

    Args:
        records: finished cells.
        planned: how many cells the study has.
        folder: where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    study, machine = Study(records), environment("torch", "megatron-core")
    lengths = _lengths(records)
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "megatron-core"))
    hours = sum(record["seconds"] for record in records) / 3600
    text = f"""# Deep students: the study's figures

{machine["date"]}; written by `tools/study_depth.py` from {len(records)} of {planned} planned students,
{hours:.1f} hours of one core of {machine["cpu"]}; {versions}.

Losses are cross-entropies in nats per token; held-out ones are of the last step's weights, on the same 8,192 positions
for every student. Width 64, batch 4 x 128, AdamW, constant rate after 20 steps of warm-up; steps:
{lengths}.

## Verdicts

"Better" and "worse" mean by three standard errors of the difference over seeds; a seed is one order of the text and one
draw of the weights, the same for every initialisation.

{chr(10).join(verdicts(study))}

## Held-out loss

± is one standard error over seeds; without it there is one seed. Bold: the best rate of seed 1.

{rates_table(study)}

## `deepscale` less the others

{claims_table(study)}

## Over depth, at equal steps

Training loss, mean of steps 41 to 60, which students of every depth take on the same batches.

![Training loss over depth](loss_over_depth.png)

At learning rate 0.003:

{depth_table(study, 3e-3)}

At learning rate 0.01:

{depth_table(study, 1e-2)}

## Distilled students, and wide ones

Layers of width 256 number 6, so that they have as many parameters as 96 of width 64 (and the embeddings four times as
many).

{others_table(study)}
"""
    (folder / "report.md").write_text(text)
    (folder / "loss_over_depth.png").write_bytes(draw(study))
    kept = [
        {key: value for key, value in record.items() if key != "curve"}
        | {"curve": [_rounded(record["curve"][i : i + 5]) for i in range(0, record["steps"], 5)]}
        for record in records
    ]
    write_json(folder / "study.json", {"environment": machine, "cells": kept})


def _lengths(records: Sequence[Record]) -> str:
    """How long students were trained, in words."""
    by_steps: dict[int, set[int]] = {}
    for record in records:
        by_steps.setdefault(record["steps"], set()).add(record["depth"])
    return "; ".join(
        f"{steps} at {', '.join(map(str, sorted(depths)))} layers"
        for steps, depths in sorted(by_steps.items(), reverse=True)
    )


def _rounded(losses: Sequence[float | None]) -> float | None:
    """Mean of neighbouring steps."""
    if not losses or None in losses:
        return None
    return round(float(np.mean(losses)), 3)
