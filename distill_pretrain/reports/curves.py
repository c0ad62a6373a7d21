"""Reading metrics.jsonl, the log of a training run: one JSON object per optimizer step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_pretrain.checkpoint.lineage import phase_folders
from distill_pretrain.errors import DistillPretrainError

FILE_NAME = "metrics.jsonl"
FIELDS = ("step", "loss", "ce", "kl", "grad_norm", "lr", "tokens", "tokens_per_second", "seconds")
_MAY_BE_NULL = {"loss", "ce", "kl", "grad_norm"}


class RunLogError(DistillPretrainError):
    """The log of a training run is missing or damaged."""


@dataclass(frozen=True, kw_only=True)
class TrainingCurve:
    """Columns of metrics.jsonl, by ascending step; where a resumed run repeats a step the later line counts.

    Attributes:
        columns: name -> float64[steps], NaN where the file has null or nothing: `FIELDS`, and every further number of
            some line (true is 1).
        cut_off: the last line was incomplete (a killed run) and left out.
    """

    columns: dict[str, npt.NDArray[np.float64]]
    cut_off: bool

    def __getitem__(self, name: str) -> npt.NDArray[np.float64]:
        """Return one column."""
        return self.columns[name]

    @property
    def has_kl(self) -> bool:
        """Whether the run trained from a cache."""
        return not bool(np.isnan(self["kl"]).all())

    @classmethod
    def load(cls, folder: Path) -> TrainingCurve:
        """Reads FOLDER/metrics.jsonl; of a run of phases those of all that have begun, steps and tokens counted on.

        Raises:
            RunLogError: missing, empty, or damaged anywhere but in an incomplete last line.
        """
        parts = begun_phases(folder)
        if parts:
            return cls._joined([cls.load(part) for part in parts])
        path = folder / FILE_NAME
        try:
            text = path.read_bytes()
        except OSError as error:
            raise RunLogError(
                "the log of a training run cannot be read",
                where=path,
                found=error.strerror,
                expected="a run folder written by `distill-pretrain train`",
                remedy="train first, or correct the path",
            ) from None
        lines = text.split(b"\n")
        tail = lines.pop()
        rows: dict[int, dict[str, float]] = {}
        names = dict.fromkeys(FIELDS)
        for number, line in enumerate(lines, start=1):
            row = _row(line)
            if isinstance(row, str):
                raise _damaged(f"{path}:{number}", row)
            rows[int(row["step"])] = row
            names.update(dict.fromkeys(row))
        last = _row(tail) if tail else ""
        if not isinstance(last, str):
            rows[int(last["step"])] = last
            names.update(dict.fromkeys(last))
        if not rows:
            raise _damaged(path, "no complete line")
        steps, nan = sorted(rows), float("nan")
        columns = {
            name: np.array([rows[step].get(name, nan) for step in steps], dtype=np.float64)
            for name in names
        }
        return cls(columns=columns, cut_off=bool(tail) and isinstance(last, str))

    @classmethod
    def _joined(cls, parts: Sequence[TrainingCurve]) -> TrainingCurve:
        """Put one curve behind the other."""
        names = dict.fromkeys(name for part in parts for name in part.columns)
        columns: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in names}
        before = {"step": 0.0, "tokens": 0.0}
        for part in parts:
            missing = np.full(len(part["step"]), np.nan)
            for name, found in columns.items():
                found.append(part.columns.get(name, missing) + before.get(name, 0.0))
            before = {name: float(columns[name][-1][-1]) for name in before}
        return cls(
            columns={name: np.concatenate(found) for name, found in columns.items()},
            cut_off=parts[-1].cut_off,
        )


def begun_phases(run: Path) -> list[Path]:
    """Return the folders of a run's phases that have done a step, in order; empty for a run without phases."""
    logs = [folder / FILE_NAME for folder in phase_folders(run)]
    return [log.parent for log in logs if log.is_file() and log.stat().st_size]


def _row(line: bytes) -> dict[str, float] | str:
    """The numbers of a record, or what is wrong with the line."""
    try:
        record: Any = json.loads(line)
    except ValueError:
        return "no valid JSON"
    if not isinstance(record, dict):
        return "no JSON object"
    row = {}
    for name in FIELDS:
        value = record.pop(name, None)
        if value is None and name in _MAY_BE_NULL:
            value = float("nan")
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"{name} is {json.dumps(value)}, expected a number"
        try:
            row[name] = float(value)
        except OverflowError:
            return f"{name} is too large"
    if not row["step"].is_integer() or row["step"] < 0:
        return f"step is {row['step']}, expected a whole number"
    for name, value in record.items():
        if value is None or isinstance(value, int | float):
            row[name] = float("nan") if value is None else float(value)
    return row


def _damaged(where: object, found: str) -> RunLogError:
    return RunLogError(
        "the log of a training run is damaged",
        where=where,
        found=found,
        expected="one JSON object per optimizer step",
        remedy="repair or remove that line; only an incomplete last line is ignored",
    )
