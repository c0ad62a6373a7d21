"""One run as one HTML file that needs nothing else: its figures, its curves, what happened to it, its recipe.

Everything in it is read from the run folder: metrics.jsonl, events.jsonl, recipe.yaml, checkpoints/.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from distill_pretrain.files.atomic import publish_bytes
from distill_pretrain.reports.curves import FIELDS, TrainingCurve, begun_phases
from distill_pretrain.reports.run_plot import Mark, draw, legend

PAGE = "run.html"
LAST_STEPS = 20
"""Final figures are means, or medians of speeds, over so many last steps."""

_OTHER = (
    "applied",
    "data_wait",
    "tflops_per_device",
    "mfu",
    "cache_mb_per_s",
    "rss_peak_gb",
    "gpu_peak_gb",
    "time",
    "load_balancing_loss",
    "router_z_loss",
)
_STYLE = """
:root{color-scheme:light dark;--ink:#222;--dim:#666;--line:#ddd;--page:#fff;--box:#f6f6f6}
@media(prefers-color-scheme:dark){:root{--ink:#e6e6e6;--dim:#9a9a9a;--line:#3a3a3a;--page:#161616;--box:#202020}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:1180px;margin:2em auto;
padding:0 1em}h1{font-size:1.5em;margin:0}h2{font-size:1.1em;margin:1.6em 0 .4em}.dim{color:var(--dim)}
.tiles{display:flex;flex-wrap:wrap;gap:.6em;margin:1em 0}.tile{background:var(--box);border-radius:6px;
padding:.45em .9em}.tile b{display:block;font-size:1.2em}.tile span{color:var(--dim);font-size:.85em}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(420px,100%),1fr));gap:1.2em}figure{margin:0}
figcaption{font-size:.9em}.key{margin-left:.8em;color:var(--dim)}.key i{display:inline-block;width:.8em;height:.8em;
border-radius:2px;margin-right:.3em;vertical-align:-.05em}svg{width:100%;height:auto;font:11px system-ui,sans-serif}
svg text{fill:var(--dim)}.grid{stroke:var(--line)}polyline{fill:none;stroke-width:2;stroke-linejoin:round}
.raw{fill-opacity:.22;stroke-opacity:.3;stroke-width:.7}.start{stroke:var(--dim);stroke-dasharray:4 3}
.bad{stroke:#c00;stroke-opacity:.8}table{border-collapse:collapse}td,th{text-align:left;padding:.15em .9em .15em 0;
border-bottom:1px solid var(--line);vertical-align:top}pre{background:var(--box);padding:1em;overflow:auto;
border-radius:6px;font-size:.85em}
"""


def write_run_page(run: Path, output: Path | None = None) -> Path:
    """Write the page of a run, finished or not.

    Args:
        run: its folder.
        output: the HTML file; None writes run.html into the folder.

    Returns:
        Path of the page.

    Raises:
        RunLogError: metrics.jsonl is missing or damaged.
    """
    curve = TrainingCurve.load(run)
    events = read_events(run)
    path = output or run / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_bytes(path, _page(run, curve, events).encode())
    return path


def read_events(run: Path) -> list[dict[str, Any]]:
    """Read events.jsonl of a run, a torn line left out; it is empty for a run of an earlier version.

    Of a run of phases they are those of all, with their steps counted on.
    """
    phases, found, before = begun_phases(run), [], 0
    for phase in phases:
        for event in read_events(phase):
            found.append({**event, "step": event["step"] + before})
        before += int(TrainingCurve.load(phase)["step"][-1])
    if phases:
        return found
    try:
        lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def _page(run: Path, curve: TrainingCurve, events: list[dict[str, Any]]) -> str:
    name = html.escape(run.resolve().name)
    written = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    sections = [
        f"<h1>{name}</h1>",
        f'<div class="dim">{html.escape(_state(curve, events))} Page written {written}.</div>',
        f'<div class="tiles">{"".join(_tile(*tile) for tile in _tiles(curve))}</div>',
        f'<div class="plots">{"".join(_plots(curve, _marks(curve, events)))}</div>',
        '<p class="dim">Faint: as logged; bold: averaged over neighbouring steps. The first tenth of a run, and single '
        "outliers, may lie outside a picture. Dashed lines: starts from a checkpoint, or of a phase; red lines: bad "
        "steps and rollbacks.</p>",
        "<h2>What happened</h2>",
        _history(curve, events),
        "<h2>Recipe</h2>",
        f'<pre tabindex="0" role="region" aria-label="Recipe">{html.escape(_recipe(run))}</pre>',
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _state(curve: TrainingCurve, events: list[dict[str, Any]]) -> str:
    """How far the run is, in a sentence."""
    done = int(curve["step"][-1])
    last = events[-1]["event"] if events else None
    states = {"finished": "Finished", "stopped": "Stopped when asked"}
    state = states.get(str(last), "Not finished, or killed,")
    starts = sum(event["event"] == "started" for event in events)
    text = f"{state} at step {done:,}" if last is not None else f"{done:,} steps"
    if starts > 1:
        text += f"; started {starts} times"
    if curve.cut_off:
        text += "; the log ends in an incomplete line, which is left out"
    return text + "."


def _last(curve: TrainingCurve, name: str, *, median: bool = False) -> float | None:
    values = curve.columns.get(name)
    if values is None:
        return None
    known = values[-LAST_STEPS:][np.isfinite(values[-LAST_STEPS:])]
    if not len(known):
        return None
    return float(np.median(known) if median else np.mean(known))


def _tiles(curve: TrainingCurve) -> list[tuple[str, float | None, str]]:
    """(what, value, format) of the figures at the top; those without a value are left out."""
    wait = None
    if "data_wait" in curve.columns:
        wait = float(np.nansum(curve["data_wait"]) / np.nansum(curve["seconds"]))
    return [
        ("steps", float(curve["step"][-1]), ",.0f"),
        ("tokens seen", float(curve["tokens"][-1]), ",.0f"),
        *((f"{name}, final", _last(curve, name), ".4f") for name in _terms(curve)),
        ("tokens/s", _last(curve, "tokens_per_second", median=True), ",.0f"),
        ("TFLOP/s per device", _last(curve, "tflops_per_device", median=True), ",.3g"),
        ("model FLOPs utilisation", _last(curve, "mfu", median=True), ".1%"),
        ("of the time waiting for data", wait, ".2%"),
        ("GB host memory, most", _last(curve, "rss_peak_gb"), ",.3g"),
        ("GB GPU memory, most", _last(curve, "gpu_peak_gb"), ",.3g"),
        ("updates left out", _left_out(curve), ",.0f"),
    ]


def _left_out(curve: TrainingCurve) -> float | None:
    applied = curve.columns.get("applied")
    return None if applied is None else float(np.sum(applied == 0))


def _tile(what: str, value: float | None, form: str) -> str:
    if value is None:
        return ""
    return f'<div class="tile"><b>{value:{form}}</b><span>{html.escape(what)}</span></div>'


def _terms(curve: TrainingCurve) -> list[str]:
    """Loss terms: whatever has no other meaning, with at least one value."""
    known = {*FIELDS, *_OTHER} - {"loss", "ce", "kl"}
    names = [name for name in curve.columns if name not in known]
    return [name for name in names if np.isfinite(curve[name]).any()]


def _plots(curve: TrainingCurve, marks: Sequence[Mark]) -> list[str]:
    steps = curve["step"]
    share = {"data_wait": "waiting for data, share of a step"}
    figures = [
        _figure(curve, [name], f"{name} (nats per token)", marks=marks) for name in _terms(curve)
    ]
    figures += [
        _figure(curve, ["load_balancing_loss"], "load balancing of routers, 1 in balance"),
        _figure(curve, ["router_z_loss"], "squared log-sum-exp of router logits", from_zero=True),
        _figure(curve, ["lr"], "learning rate", from_zero=True, smoothed=False),
        _figure(curve, ["grad_norm"], "gradient norm before clipping", marks=marks, log_scale=True),
        _figure(curve, ["tokens_per_second"], "tokens per second", marks=marks, from_zero=True),
        _figure(curve, ["tflops_per_device"], "model TFLOP/s per device", from_zero=True),
        _figure(curve, ["mfu"], "model FLOPs utilisation", from_zero=True),
    ]
    if "data_wait" in curve.columns:
        waits = {"share": curve["data_wait"] / curve["seconds"]}
        svg = draw(steps, waits, y_label=share["data_wait"], marks=marks, from_zero=True)
        figures.append(_framed(share["data_wait"], svg))
    figures += [
        _figure(curve, ["cache_mb_per_s"], "cache read, MB/s of one rank", from_zero=True),
        _figure(
            curve,
            ["rss_peak_gb", "gpu_peak_gb"],
            "peak memory of a process, GB",
            from_zero=True,
            smoothed=False,
            marks=marks,
        ),
    ]
    return figures


def _figure(curve: TrainingCurve, names: Sequence[str], caption: str, **options: Any) -> str:
    """A plot of the columns that have values; nothing where none has."""
    series = {
        name: curve[name]
        for name in names
        if name in curve.columns and np.isfinite(curve[name]).any()
    }
    if not series:
        return ""
    steps = curve["step"]
    known = np.isfinite(next(iter(series.values())))
    if len(series) == 1 and known.mean() < 0.5:
        # Known now and then, as held-out figures are: a line from one to the next, and nothing to smooth.
        steps, series = steps[known], {name: values[known] for name, values in series.items()}
        options["smoothed"] = False
    keys = legend(list(series)) if len(names) > 1 else ""
    return _framed(caption, draw(steps, series, y_label=caption, **options), keys)


def _framed(caption: str, svg: str, keys: str = "") -> str:
    return f"<figure><figcaption>{html.escape(caption)}{keys}</figcaption>{svg}</figure>"


def _marks(curve: TrainingCurve, events: list[dict[str, Any]]) -> list[Mark]:
    """Restarts, rollbacks and bad steps; of the latter also those that the log alone knows."""
    marks = []
    for event in events:
        text = _event_text(event)
        if event["event"] == "phase" or (event["event"] == "started" and event["step"]):
            marks.append(Mark(step=event["step"], text=text, kind="start"))
        elif event["event"] in ("bad_step", "rolled_back"):
            marks.append(Mark(step=event["step"], text=text, kind="bad"))
    told = {mark.step for mark in marks if mark.kind == "bad"}
    if "applied" in curve.columns:
        bad = curve["step"][curve["applied"] == 0]
        marks += [
            Mark(step=step, text=f"step {step:.0f}: not applied", kind="bad")
            for step in bad.tolist()
            if step not in told
        ]
    return marks


def _event_text(event: dict[str, Any]) -> str:
    facts = {k: v for k, v in event.items() if k not in ("event", "step", "time")}
    told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
    text = f"step {event['step']}: {event['event'].replace('_', ' ')}"
    return f"{text} ({told})" if told else text


def _history(curve: TrainingCurve, events: list[dict[str, Any]]) -> str:
    """A table of events without the saves, which are summed up, and the bad steps that only the log has."""
    saves = [float(event.get("seconds", 0)) for event in events if event["event"] == "saved"]
    rows = [
        (_moment(event.get("time")), _event_text(event))
        for event in events
        if event["event"] != "saved"
    ]
    lines = []
    if saves:
        lines.append(
            f"<p>{len(saves)} checkpoints saved, {np.median(saves):.2f} s each (median), {sum(saves):.0f} s in all."
            "</p>"
        )
    repeated = sum(int(event["steps"]) for event in events if event["event"] == "repeating")
    if repeated:
        lines.append(f"<p>{repeated:,} steps were done again after restarts and rollbacks.</p>")
    if rows:
        cells = "".join(
            f"<tr><td>{when}</td><td>{html.escape(what)}</td></tr>" for when, what in rows
        )
        lines.append(f"<table><tr><th>when</th><th>what</th></tr>{cells}</table>")
    elif not lines:
        lines.append("<p>There is no events.jsonl in the run folder.</p>")
    return "".join(lines)


def _moment(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return ""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _recipe(run: Path) -> str:
    try:
        return (run / "recipe.yaml").read_text(encoding="utf-8")
    except OSError:
        return "recipe.yaml is not in the run folder"
