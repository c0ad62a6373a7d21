"""What a checkpoint records of the run that it belongs to, and what two runs must share.

identity = {
    "version": 2,                   absent in records of version 1
    "model", "optimizer", "objective": {key: value, ...}     those keys that decide the weights, defaults included
    "at_default": ["model.dropout", ...]                     keys of these sections that the recipe left alone
    ...                             of the data, the precision and so on: see `train.job.run_identity`
}

A record lacks the keys that were added since it was written, and may have keys that a newer version added. A missing
key has today's default, and an unknown one counts for nothing where it had its default. Whoever adds a key chooses a
default that means what the code did before, or else raises VERSION and adds a line to _MIGRATIONS; and names the key
in IRRELEVANT if it does not decide the weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from distill_pretrain.config import Section
from distill_pretrain.errors import CheckpointError
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.mcore.init.deep import require_residual
from distill_pretrain.mcore.model.config import ModelConfig, OptimizerConfig

VERSION = 2
SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "objective": ObjectiveConfig,
}
IRRELEVANT = {
    # How the layers are computed, and held; FP8 has a field of its own, written only where it is used.
    "model": frozenset({"spec", "implementation", "fp8", "fp8_recipe"}),
    # What shards the optimizer: any backend goes on from the state of another.
    "optimizer": frozenset({"backend", "zero_stage", "offload"}),
    # How the loss is computed.
    "objective": frozenset({"kernel", "head"}),
}
"""Keys in which a run may differ from the checkpoint that it goes on from."""

_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    # Version 1 did not say which keys the recipe had left alone; all that it has are known.
    1: lambda identity: {**identity, "at_default": []},
}
"""Version -> what makes of its identities those of the next version."""

_WORDS = {
    "blend_splits": "data.weight and the weights of data.blend",
    "cache_plan_id": "data.cache",
    "distributed_optimizer": "parallel.distributed_optimizer",
    "fp8": "model.fp8, model.fp8_recipe",
    "global_batch_size": "train.global_batch_size",
    "loss_sha256": "what data.tokens leaves out of the loss",
    "num_sequences": "data.num_sequences",
    "precision": "train.precision",
    "seed": "train.seed",
    "seq_len": "data.seq_len",
    "continue_from": "train.continue_from",
    "start_from": "train.start_from",
    "sequence_plan_id": "data.tokens, data.seed, data.documents, data.packing",
    "tokenizer_sha256": "tokenizer of data.tokens",
    "vocab_size": "data.vocab_size",
}
_ABSENT = "nothing"


def described(name: str, section: Section) -> dict[str, Any]:
    """Return the keys of a section that decide the weights, as JSON values."""
    return section.model_dump(mode="json", exclude=set(IRRELEVANT[name]))


def at_default(sections: Mapping[str, Section]) -> list[str]:
    """List the keys of sections that have their default value, as `section.key`."""
    found = []
    for name, section in sections.items():
        defaults = _defaults(name)
        found += [
            f"{name}.{key}"
            for key, value in described(name, section).items()
            if key in defaults and value == defaults[key]
        ]
    return found


def _defaults(name: str) -> dict[str, Any]:
    """The default of every key of a section that has one and decides the weights."""
    return described(name, SECTIONS[name].model_construct())


def upgraded(identity: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Bring an identity into the form of this version.

    Raises:
        CheckpointError: a newer version wrote it, or it is damaged.
    """
    values, version = dict(identity), identity.get("version", 1)
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise CheckpointError(
            "the checkpoint was written by another version of distill-pretrain",
            where=where,
            found=f"identity version {version}",
            expected=f"at most {VERSION}",
            remedy="use the version that wrote it, or a newer one",
        )
    while version < VERSION:
        values, version = _MIGRATIONS[version](values), version + 1
    values["version"] = VERSION
    if not isinstance(values.get("at_default"), list):
        raise _damaged(where, "no list at_default")
    return {
        name: _completed(name, value, values["at_default"])
        if name in SECTIONS and isinstance(value, dict)
        else value
        for name, value in values.items()
    }


def _completed(name: str, values: dict[str, Any], left_alone: list[Any]) -> dict[str, Any]:
    """A recorded section with today's defaults, and without what counts for nothing."""
    known = SECTIONS[name].model_fields
    counting = {
        key: value
        for key, value in values.items()
        if key not in IRRELEVANT[name] and (key in known or f"{name}.{key}" not in left_alone)
    }
    return {**_defaults(name), **counting}


def differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], where: object, *, step: int | None = None
) -> list[str]:
    """Say, in a line for each key as the recipe calls it, where a checkpoint (`found`) and a run differ.

    Args:
        found: identity of the checkpoint.
        wanted: of the run.
        where: the checkpoint, for messages.
        step: of the checkpoint; a schedule decides nothing of it before its decay begins. None compares it whole.
    """
    sides = [upgraded(found, where), upgraded(wanted, "this run")]
    not_set = "optimizer.decay_steps" in sides[1]["at_default"]
    for side in sides:
        del side["version"], side["at_default"]
    _compare_starts(*sides)
    if step is not None and all(step <= _decay_begins(side.get("optimizer")) for side in sides):
        for side in sides:
            side["optimizer"] = {k: v for k, v in side["optimizer"].items() if k not in _DECAY}
            side["objective"] = _before_decay(side.get("objective"))
    old, new = (dict(_leaves(side)) for side in sides)
    differing = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    if "sequence_plan_id" not in differing and "sequence_plan_id" in old:
        # The plan's id covers every id of the corpus: of the same ids, the tokenizer's name decides nothing.
        differing.discard("tokenizer_sha256")
    # What follows from another difference is not named beside it.
    for causes, effect in (
        (("model.",), "residual."),
        (("optimizer.decay_style",), "optimizer.decay_steps"),
        (("seq_len",), "sequence_plan_id"),
        (("seq_len", "sequence_plan_id"), "num_sequences"),
    ):
        if any(key.startswith(causes) for key in differing):
            differing = {key for key in differing if not key.startswith(effect)}
    return [
        f"{_in_words(key, decay_is_steps=not_set)}: checkpoint {_shown(old, key)}, this run {_shown(new, key)}"
        for key in sorted(differing)
    ]


_DECAY = ("decay_style", "decay_steps", "wsd_decay_steps", "wsd_decay_style")


def _before_decay(objective: Any) -> Any:
    """What of an objective counts before the decay of the rate: of {"stable", "decayed"} the first."""
    if not isinstance(objective, dict):
        return objective
    return {
        key: value.get("stable") if isinstance(value, dict) else value
        for key, value in objective.items()
    }


def _decay_begins(optimizer: Any) -> float:
    """Steps to which a schedule with a stable part is the same whatever its decay; -1 for one without."""
    if not isinstance(optimizer, dict):
        return -1
    if optimizer.get("decay_style") == "constant":
        return math.inf
    end, length = optimizer.get("decay_steps"), optimizer.get("wsd_decay_steps")
    if optimizer.get("decay_style") != "wsd" or not isinstance(end, int):
        return -1
    return end - length if isinstance(length, int) else -1


def _compare_starts(*sides: dict[str, Any]) -> None:
    """Weights that two runs start from are the same wherever they lie; others are named by their place, too."""
    starts = [side.pop("start_from", None) for side in sides]
    counting = [
        {key: start.get(key) for key in _OF_START} if isinstance(start, dict) else start
        for start in starts
    ]
    of_phase = any(isinstance(start, dict) and "optimizer" in start for start in starts)
    for side, start in zip(sides, starts, strict=True):
        if start is not None and counting[0] != counting[1]:
            side["continue_from" if of_phase else "start_from"] = start_in_words(start)


_OF_START = ("sha256", "optimizer", "first_sequence")
"""What of a start decides the weights; where the source lay, and what came before it, do not."""


def start_in_words(start: Any) -> str:
    """Describe the weights that a run started from, as its identity records them."""
    if not isinstance(start, dict):
        return f"{start}"
    words = f"{start.get('path')} (sha256 {str(start.get('sha256'))[:12]})"
    if "optimizer" in start:
        words += (
            f", optimizer {start['optimizer']}, data from sequence {start.get('first_sequence')}"
        )
    return words


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no object, by its keys joined with dots; objects in lists by their number."""
    for key, inner in value.items():
        if isinstance(inner, list) and inner and all(isinstance(part, dict) for part in inner):
            inner = {f"{number}": part for number, part in enumerate(inner)}
        if isinstance(inner, dict):
            yield from _leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _in_words(key: str, *, decay_is_steps: bool) -> str:
    if key == "optimizer.decay_steps" and decay_is_steps:
        return "train.steps (the length of the decay, as optimizer.decay_steps is not set)"
    first, _, rest = key.partition(".")
    if first == "blend":
        number, _, rest = rest.partition(".")
        return f"data.blend[{number}]: {_WORDS.get(rest, rest)}"
    if first == "residual":
        return f"model.init, its residual scaling: {rest}"
    return _WORDS.get(key, key)


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    """A value as a recipe writes it; hashes cut short."""
    if key not in leaves:
        return _ABSENT
    value = leaves[key]
    if isinstance(value, str):
        return value[:12] if len(value) == 64 else value
    return json.dumps(value)


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What a checkpoint's weights belong to.

    Attributes:
        model: architecture.
        vocab_size: V, without padding.
        seq_len: positions of the sequences it was trained on.
        precision: "fp32" or "bf16", of the training.
        tokenizer_sha256: of the corpus; None where it is unknown.
    """

    model: ModelConfig
    vocab_size: int
    seq_len: int
    precision: str
    tokenizer_sha256: str | None


def trained_model(identity: Mapping[str, Any], where: object) -> TrainedModel:
    """Return the model that a checkpoint's identity describes.

    Args:
        identity: of any version.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: the record is damaged, or of a model that this version does not know, or does not compute in
            the same way.
    """
    values = upgraded(identity, where)
    model = values.get("model")
    if not isinstance(model, dict):
        raise _damaged(where, "no model")
    unknown = sorted(model.keys() - ModelConfig.model_fields.keys())
    if unknown:
        raise CheckpointError(
            "this version of distill-pretrain does not know what the checkpoint's model uses",
            where=where,
            found=", ".join(f"model.{key}: {json.dumps(model[key])}" for key in unknown),
            remedy="use the version that trained it, or a newer one",
        )
    try:
        config = ModelConfig(**model)
    except ValidationError as error:
        problems = [f"model.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise _damaged(where, "; ".join(problems)) from None
    for key in ("vocab_size", "seq_len"):
        if not isinstance(values.get(key), int):
            raise _damaged(where, f"{key}: {values.get(key)!r}")
    if not isinstance(values.get("residual", {}), dict):
        raise _damaged(where, f"residual: {values['residual']!r}")
    require_residual(values, config, where)
    precision = values.get("precision", "fp32")
    if precision not in ("fp32", "bf16"):
        raise _damaged(where, f"precision: {precision!r}")
    return TrainedModel(
        model=config,
        vocab_size=values["vocab_size"],
        seq_len=values["seq_len"],
        precision=precision,
        tokenizer_sha256=values.get("tokenizer_sha256"),
    )


def _damaged(where: object, found: str) -> CheckpointError:
    return CheckpointError("the checkpoint's record is damaged", where=where, found=found)
