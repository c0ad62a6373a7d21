"""The phases of a recipe: a recipe of its own for each, checked together before the first begins."""

from __future__ import annotations

from dataclasses import dataclass

from distill_pretrain.errors import ConfigError
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.jobs.settings import with_settings
from distill_pretrain.jobs.start import settings_of


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Attributes:
        name: of its folder.
        recipe: an ordinary one, without phases, that starts from the end of the phase before.
    """

    name: str
    recipe: Recipe


def phases_of(recipe: Recipe) -> list[Phase]:
    """Return the phases of a recipe; each one's settings lie over those of the phase before.

    Args:
        recipe: with data, model, train and phases.

    Raises:
        ConfigError: a key is unknown, a value is refused, or a phase changes what cannot change; names the phase.
    """
    from distill_pretrain.checkpoint.phase import what_cannot_change

    assert recipe.train
    root = recipe.train.output_dir
    found: list[Phase] = []
    before = recipe.model_copy(update={"phases": ()})
    for number, phase in enumerate(recipe.phases):
        where = f"phases[{number}] ({phase.name})"
        own: dict[str, dict[str, object]] = {
            name: dict(keys) for name, keys in phase.settings.items()
        }
        train = own.setdefault("train", {})
        taken = sorted(
            train.keys() & {"output_dir", "continue_from", *(["start_from"] if found else [])}
        )
        if taken:
            raise ConfigError(
                "a phase has its folder below the run's, and starts from the phase before",
                where=where,
                found=", ".join(f"train.{key}" for key in taken),
                remedy="leave it out; the run's own are in the section train",
            )
        train["output_dir"] = f"{root / phase.name}"
        if found:
            assert before.train
            last = root / found[-1].name / "checkpoints" / f"step-{before.train.steps:08d}"
            train["continue_from"], train["start_from"] = f"{last}", None
            train.setdefault("fresh_optimizer", False)
        this = with_settings(before, where, own, what="a phase")
        if found:
            assert this.train
            keeps = not this.train.fresh_optimizer
            problems = what_cannot_change(
                settings_of(before), settings_of(this), keeps_optimizer=keeps
            )
            problems += _other_tokenizer(before, this)
            if problems:
                raise ConfigError(
                    "a phase changes what cannot change:\n"
                    + "\n".join(f"  - {line}" for line in problems),
                    where=where,
                    remedy="restore these keys, or, for those of the optimizer's state, set train.fresh_optimizer",
                )
        found.append(Phase(phase.name, this))
        before = this
    return found


def _other_tokenizer(before: Recipe, this: Recipe) -> list[str]:
    """Return a line where both corpora are there and tell of two tokenizers."""
    from distill_pretrain.corpus.tokens_record import TokensRecord

    assert before.data and this.data
    records = [TokensRecord.beside(recipe.data.tokens) for recipe in (before, this) if recipe.data]
    digests = [record.tokenizer_digests for record in records if record is not None]
    if len(digests) < 2 or set(digests[0]) & set(digests[1]):
        return []
    names = [f"{of[0][:12]}" for of in digests]
    return [f"tokenizer of data.tokens: {names[0]} before, {names[1]} in the phase"]
