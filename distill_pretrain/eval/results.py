"""The JSON file that `eval` writes and `report` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill_pretrain.errors import DistillPretrainError
from distill_pretrain.eval.metrics import ModelScores, PairedDifference
from distill_pretrain.formats.atomic import publish_bytes

VERSION = 1
PAIRED_FIELDS = ("ce", "kl")


class EvalFileError(DistillPretrainError):
    """The figures of an evaluation are missing or damaged."""


@dataclass(frozen=True, kw_only=True)
class EvalResults:
    """Held-out figures of several models on the same sequences.

    Attributes:
        inputs: all that decides the figures (JSON-able): held-out corpus, sequences, identities of the models.
        scores: name -> `ModelScores.as_dict()`, in the order of the recipe.
        paired: name -> other name -> {"ce", "kl"} -> {"difference", "standard_error"}; name minus other, in
            nats per token; "kl" only with a teacher.
        software: package -> version.
        date: ISO 8601, UTC.
    """

    inputs: dict[str, Any]
    scores: dict[str, dict[str, Any]]
    paired: dict[str, dict[str, dict[str, dict[str, Any]]]]
    software: dict[str, str]
    date: str

    @classmethod
    def of(
        cls,
        scores: Mapping[str, ModelScores],
        *,
        inputs: dict[str, Any],
        software: dict[str, str],
        date: str,
    ) -> EvalResults:
        """From the scores that `heldout.evaluate` returns."""
        has_teacher = any(score.kl is not None for score in scores.values())
        fields = [field for field in PAIRED_FIELDS if field != "kl" or has_teacher]
        paired = {
            name: {
                other: {field: asdict(PairedDifference.of(a, b, field)) for field in fields}
                for other, b in scores.items()
                if other != name
            }
            for name, a in scores.items()
        }
        return cls(
            inputs=inputs,
            scores={name: score.as_dict() for name, score in scores.items()},
            paired=paired,
            software=software,
            date=date,
        )

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all; the folder is created."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=2, allow_nan=False)
        publish_bytes(path, text.encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> EvalResults:
        """Reads the file.

        Raises:
            EvalFileError: missing, damaged, or of another version.
        """
        try:
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise _unusable(path, error.strerror or str(error)) from None
        except ValueError as error:
            raise _unusable(path, f"no valid JSON ({error})") from None
        problem = _problem(values)
        if problem is not None:
            raise _unusable(path, problem)
        del values["version"]
        return cls(**values)


def _problem(values: Any) -> str | None:
    if not isinstance(values, dict) or values.get("version") != VERSION:
        return f"not a version {VERSION} record"
    kinds = {
        "version": int,
        "inputs": dict,
        "scores": dict,
        "paired": dict,
        "software": dict,
        "date": str,
    }
    if set(values) != set(kinds):
        return f"keys {sorted(set(values) ^ set(kinds))} are missing or unknown"
    for name, kind in kinds.items():
        if not isinstance(values[name], kind):
            return f"{name} is no {kind.__name__}"
    if not values["scores"]:
        return "no scores"
    names = [field for field in ModelScores.__dataclass_fields__ if field != "sums"]
    for model, scores in values["scores"].items():
        if not isinstance(scores, dict) or set(scores) != set(names):
            return f"the figures of {model} are incomplete"
        if not all(v is None or type(v) in (int, float) for v in scores.values()):
            return f"a figure of {model} is no number"
        if any(scores[n] is None for n in ("ce", "perplexity", "num_positions", "top1_accuracy")):
            return f"a figure of {model} is missing"
    return _paired_problem(values["paired"])


def _paired_problem(paired: dict[str, Any]) -> str | None:
    try:
        for others in paired.values():
            for fields in others.values():
                for pair in fields.values():
                    error = pair["standard_error"]
                    float(pair["difference"] + (0.0 if error is None else error))
    except (AttributeError, KeyError, TypeError, ValueError):
        return "a paired difference is incomplete"
    return None


def _unusable(path: Path, found: str) -> EvalFileError:
    return EvalFileError(
        "the held-out figures cannot be read",
        where=path,
        found=found,
        expected="the JSON file that `distill-pretrain eval` writes",
        remedy="run `distill-pretrain eval` (again), or correct report.eval",
    )
