"""The JSON file that `eval` writes and `report` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill_pretrain.errors import DistillPretrainError
from distill_pretrain.eval.metrics import ModelScores, PairedDifference
from distill_pretrain.files.atomic import publish_bytes

VERSION = 3
PAIRED_FIELDS = ("ce", "kl", "cross_entropy_cache")
_SINCE_VERSION_2 = (
    "ece",
    "reliability",
    "acceptance",
    "accepted_length",
    "num_cache_positions",
    "cross_entropy_cache",
    "kl_cache",
)
_NESTED = ("reliability", "accepted_length")
_PARTS = {
    "out_of_domain": ("scores", "paired"),
    "copying": ("models",),
    "gradients": ("caches",),
    "tasks": ("models",),
}
"""What can be asked for -> its keys beside "inputs"."""


class EvalFileError(DistillPretrainError):
    """The figures of an evaluation are missing or damaged."""


@dataclass(frozen=True, kw_only=True)
class EvalResults:
    """Held-out figures of several models on the same sequences.

    Attributes:
        inputs: all that decides the figures (JSON-able): held-out corpus, sequences, identities of the models.
        scores: name -> `ModelScores.as_dict()`, in the order of the recipe.
        paired: name -> other name -> field of `PAIRED_FIELDS` -> {"difference", "standard_error"}; name minus
            other, in nats per token; "kl" only with a teacher, "cross_entropy_cache" only with a cache (there it is
            the unbiased difference of the models' KL, see `ModelScores`).
        software: package -> version.
        date: ISO 8601, UTC.
        out_of_domain: {"inputs", "scores", "paired"} on the second held-out text; None if not asked for.
        copying: what `copying_figures` returns; None if not asked for.
        gradients: {"inputs", "caches": what `compare_gradients` returns}; None if not asked for.
        tasks: {"inputs", "models": what `run_tasks` returns}; None if not asked for.
    """

    inputs: dict[str, Any]
    scores: dict[str, dict[str, Any]]
    paired: dict[str, dict[str, dict[str, dict[str, Any]]]]
    software: dict[str, str]
    date: str
    out_of_domain: dict[str, Any] | None = None
    copying: dict[str, Any] | None = None
    gradients: dict[str, Any] | None = None
    tasks: dict[str, Any] | None = None

    @classmethod
    def of(
        cls,
        scores: Mapping[str, ModelScores],
        *,
        inputs: dict[str, Any],
        software: dict[str, str],
        date: str,
    ) -> EvalResults:
        """Collect the scores that `heldout.evaluate` returns."""
        return cls(**text_figures(scores, inputs), software=software, date=date)

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all; the folder is created."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=2, allow_nan=False)
        publish_bytes(path, text.encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> EvalResults:
        """Reads the file; in one of an earlier version the figures that came later are None.

        Raises:
            EvalFileError: missing, damaged, or of a later version.
        """
        try:
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise _unusable(path, error.strerror or str(error)) from None
        except ValueError as error:
            raise _unusable(path, f"no valid JSON ({error})") from None
        if isinstance(values, dict) and values.get("version") == 1:
            values = _from_version_1(values)
        if isinstance(values, dict) and values.get("version") == 2:
            values = {**values, "out_of_domain": None, "copying": None, "version": VERSION}
        problem = _problem(values)
        if problem is not None:
            raise _unusable(path, problem)
        del values["version"]
        return cls(**values)


def text_figures(scores: Mapping[str, ModelScores], inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the "inputs", "scores" and "paired" of `EvalResults`, of models scored on one text."""
    first = next(iter(scores.values()))
    fields = [field for field in PAIRED_FIELDS if getattr(first, field) is not None]
    paired = {
        name: {
            other: {field: asdict(PairedDifference.of(a, b, field)) for field in fields}
            for other, b in scores.items()
            if other != name
        }
        for name, a in scores.items()
    }
    return {
        "inputs": inputs,
        "scores": {name: score.as_dict() for name, score in scores.items()},
        "paired": paired,
    }


def _from_version_1(values: dict[str, Any]) -> dict[str, Any]:
    scores = values.get("scores")
    if isinstance(scores, dict):
        missing = dict.fromkeys(_SINCE_VERSION_2)
        scores = {k: {**missing, **v} if isinstance(v, dict) else v for k, v in scores.items()}
    return {**values, "scores": scores, "gradients": None, "tasks": None, "version": 2}


def _problem(values: Any) -> str | None:
    if not isinstance(values, dict) or values.get("version") != VERSION:
        return f"not a record of version 1 to {VERSION}"
    kinds: dict[str, type | tuple[type, ...]] = {
        "version": int,
        "inputs": dict,
        "scores": dict,
        "paired": dict,
        "software": dict,
        "date": str,
        "out_of_domain": (dict, type(None)),
        "copying": (dict, type(None)),
        "gradients": (dict, type(None)),
        "tasks": (dict, type(None)),
    }
    if set(values) != set(kinds):
        return f"keys {sorted(set(values) ^ set(kinds))} are missing or unknown"
    for name, kind in kinds.items():
        if not isinstance(values[name], kind):
            return f"{name} is {type(values[name]).__name__}"
    for name, keys in _PARTS.items():
        part = values[name]
        if part is not None and not all(isinstance(part.get(k), dict) for k in ("inputs", *keys)):
            return f"{name} is incomplete"
    problem = _text_problem(values)
    if problem is None and values["out_of_domain"] is not None:
        problem = _text_problem(values["out_of_domain"])
    return problem


def _text_problem(values: dict[str, Any]) -> str | None:
    """What is wrong with the "scores" and "paired" on one text."""
    if not values["scores"]:
        return "no scores"
    for model, scores in values["scores"].items():
        problem = _scores_problem(scores)
        if problem is not None:
            return f"{problem} of {model}"
    return _paired_problem(values["paired"])


def _scores_problem(scores: Any) -> str | None:
    names = {field for field in ModelScores.__dataclass_fields__ if field != "sums"}
    if not isinstance(scores, dict) or set(scores) != names:
        return "incomplete figures"
    if any(scores[n] is None for n in ("ce", "perplexity", "num_positions", "top1_accuracy")):
        return "a missing figure"
    plain = [value for name, value in scores.items() if name not in _NESTED]
    lengths = scores["accepted_length"]
    if lengths is not None:
        if not isinstance(lengths, dict):
            return "no mapping of accepted lengths"
        plain += lengths.values()
    if not all(v is None or type(v) in (int, float) for v in plain):
        return "a figure that is no number"
    return None if _is_reliability(scores["reliability"]) else "a damaged reliability diagram"


def _is_reliability(value: Any) -> bool:
    if value is None:
        return True
    names = ("bins", "positions", "confidence", "accuracy")
    if not isinstance(value, dict) or set(value) != set(names):
        return False
    if not all(isinstance(value[name], list) for name in names):
        return False
    sizes = [len(value[name]) for name in names]
    return sizes[0] > 1 and sizes[1:] == [sizes[0] - 1] * 3


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
