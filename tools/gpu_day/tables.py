"""Tables of what calls found, as Markdown.

    python tools/gpu_day/tables.py FIGURES.jsonl ... [--output docs/results/gpu/README.md]

Reads the figures of any number of calls, of one card; of a figure found twice the later one counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
TABLES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "stage": ("Stages", ("stage",), ("outcome", "seconds")),
    "compiled": ("Compiled for this card", ("what",), ("found", "seconds")),
    "error": (
        "The kernels' relative distance from float64",
        ("kernel", "dtype", "columns"),
        ("loss_error", "gradient_error"),
    ),
    "test": ("Tests on the GPU", ("file",), ("passed", "failed", "error", "skipped")),
    "copy": ("A copy", ("dtype", "rows", "columns"), ("gb_per_s",)),
    "kernel": (
        "The loss's kernels",
        ("kernel", "dtype", "rows", "columns"),
        ("ms", "fastest_ms", "predicted_ms", "gb_per_s"),
    ),
    "way": ("Other ways to the same loss", ("part", "way"), ("ms", "peak_gb", "failed")),
    "step": ("A training step", ("way",), ("seconds", "tokens_per_second")),
    "ratio": ("Speeds of a step", ("ratio",), ("median", "low_quartile", "high_quartile")),
    "training": (
        "Training runs",
        ("run",),
        (
            *("steps", "first_step_s", "seconds", "tokens_per_second", "mfu", "data_wait_s"),
            *("gpu_peak_gb", "first_loss", "last_loss", "not_applied"),
        ),
    ),
    "plan": ("Memory that `plan` foretells", ("part",), ("gb",)),
    "capture": (
        "Captures",
        ("cache", "pid"),
        ("finished", "total_positions", "positions_per_s", "bytes"),
    ),
    "profile": ("Where a step's time goes", ("name",), ("calls_per_step", "ms_per_step", "share")),
}
"""By figure: the title, the fields that tell its lines apart, and the fields that are shown."""


def read(paths: Sequence[Path]) -> list[Line]:
    """The lines of files, in order; a line cut off at the end of a file is left out."""
    found = []
    for path in paths:
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            found.append(line)
    return found


def by_figure(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The lines of each figure; the later of two that have the same names."""
    kept: dict[str, dict[Any, Line]] = {}
    for line in lines:
        figure = line.get("figure", "")
        names = TABLES[figure][1] if figure in TABLES else ()
        key = tuple(str(line.get(name)) for name in names)
        kept.setdefault(figure, {})[key] = line
    return {figure: list(some.values()) for figure, some in kept.items()}


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def table(title: str, names: Sequence[str], fields: Sequence[str], lines: Sequence[Line]) -> str:
    """A section with a row for every line; fields that no line has are left out."""
    shown = [field for field in fields if any(line.get(field) is not None for line in lines)]
    head = [name.replace("_", " ") for name in (*names, *shown)]
    rows = ["| " + " | ".join(head) + " |", "|" + ":--|" * len(names) + "--:|" * len(shown)]
    for line in lines:
        rows.append("| " + " | ".join(cell(line.get(name)) for name in (*names, *shown)) + " |")
    return f"## {title}\n\n" + "\n".join(rows) + "\n"


def described(found: dict[str, list[Line]]) -> str:
    """The card and the versions, in a sentence each."""
    text = []
    for card in found.get("card", []):
        text.append(
            f"{card['name']} (compute capability {card['capability']}, {card['multiprocessors']} "
            f"multiprocessors, {card['memory_gb']} GB), driver {card.get('driver_version', 'unknown')}, "
            f"NCCL {card['nccl']}, SM clock {card.get('clocks_sm', 'unknown')} at the start, at most "
            f"{card.get('clocks_max_sm', 'unknown')}."
        )
    for machine in found.get("machine", []):
        versions = [
            f"{name} {machine[name]}"
            for name in ("python", "torch", "megatron-core", "transformers", "distill-pretrain")
            if machine.get(name)
        ]
        text.append(
            f"{machine['date']}; {machine['cores']} cores, {machine['cpu']}; {', '.join(versions)}; "
            f"torch's CUDA {machine['torch_cuda']}."
        )
    return "\n\n".join(text)


def markdown(lines: Sequence[Line]) -> str:
    """Everything that was found."""
    found = by_figure(lines)
    parts = ["# What was measured on a GPU", described(found) or "No machine is recorded."]
    parts += [
        table(title, names, fields, found[figure])
        for figure, (title, names, fields) in TABLES.items()
        if figure in found
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", type=Path, nargs="+", metavar="FIGURES.jsonl")
    parser.add_argument("--output", type=Path, metavar="FILE.md")
    options = parser.parse_args(arguments)
    text = markdown(read(options.figures))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
