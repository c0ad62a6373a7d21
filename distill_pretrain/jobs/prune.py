"""Pruning: smaller models out of a trained one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_pretrain import __version__
from distill_pretrain.config import require
from distill_pretrain.errors import ConfigError
from distill_pretrain.jobs.console import progress, say
from distill_pretrain.jobs.prune_source import open_source
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.processes.env import launch_world_size

if TYPE_CHECKING:
    from distill_pretrain.data.config import DataConfig
    from distill_pretrain.data.sources import SequenceData
    from distill_pretrain.pruning.config import PruneConfig, TargetConfig
    from distill_pretrain.pruning.folder import Source
    from distill_pretrain.pruning.model import Batch
    from distill_pretrain.pruning.pruner import PrunedModel, Pruner
    from distill_pretrain.reports.pruning import PruneReport

_VERSION = 1
_log = logging.getLogger(__name__)


def prune(recipe: Recipe, *, to_parameters: Sequence[str] = ()) -> PruneReport:
    """Prune the model of a recipe to all its targets, and write their folders and a report.

    Args:
        recipe: with the sections data and prune.
        to_parameters: further targets, as the numbers of parameters to search for.

    Returns:
        What was made.

    Raises:
        ConfigError: settings that cannot be used, or targets that no pruning reaches; before weights are loaded.
        CheckpointError: the source is damaged or of a family that cannot be pruned, or a folder is something else.
        TokenizerMismatch: the source's vocabulary or tokenizer is not the corpus's.
    """
    require(recipe, "prune", "data", "prune")
    assert recipe.data and recipe.prune
    targets = _targets(recipe.prune, to_parameters)
    if launch_world_size() > 1:
        raise ConfigError(
            "a model is pruned by one process",
            found=f"{launch_world_size()} processes",
            remedy="start it without torchrun",
        )
    from distill_pretrain.files.disk import require_writable
    from distill_pretrain.files.ownership import owner_beside, owning
    from distill_pretrain.processes.process import process_group, set_cpu_threads
    from distill_pretrain.pruning.model import import_transformers

    import_transformers()
    output = recipe.prune.output_dir
    require_writable(output / "report.md")
    set_cpu_threads(recipe.prune.threads)
    remedy = "wait for it, or set another prune.output_dir"
    with process_group(), owning(owner_beside(output), what=output, remedy=remedy):
        sequences = _open_corpus(recipe.data, recipe.prune)
        with open_source(recipe.prune, recipe.data, sequences, targets) as (source, origin):
            return _Job(
                data=recipe.data,
                config=recipe.prune,
                targets=targets,
                sequences=sequences,
                source=source,
                origin=origin,
            ).run()


def _targets(config: PruneConfig, to_parameters: Sequence[str]) -> dict[str, TargetConfig]:
    """Return prune.targets and those of the command line.

    Raises:
        ConfigError: none, a number that is none, or a name given twice.
    """
    from distill_pretrain.pruning.config import TargetConfig, parameter_count

    targets = dict(config.targets or {})
    for text in to_parameters:
        try:
            target = TargetConfig(parameters=parameter_count(text))
        except ValueError:
            raise ConfigError(
                "no number of parameters",
                where="--to-parameters",
                found=text,
                expected="a number such as 70M or 1.2B",
            ) from None
        if text in targets:
            raise ConfigError(
                "a target has the name of another", where="--to-parameters", found=text
            )
        targets[text] = target
    if not targets:
        raise ConfigError(
            "there is nothing to prune to",
            where="prune.targets",
            expected="a name and the sizes of a smaller model, such as {half: {num_layers: 15}}",
            remedy="add a target, or use --to-parameters",
        )
    return targets


def _open_corpus(data: DataConfig, config: PruneConfig) -> SequenceData:
    """Open the corpus as one stream, and require enough whole sequences of it."""
    from distill_pretrain.data.sources import open_sequences

    sequences = open_sequences(_as_stream(data))
    whole = _whole_sequences(sequences)
    if config.num_sequences > whole:
        raise ConfigError(
            "the corpus has fewer whole sequences than are to be scored",
            where="prune.num_sequences",
            found=config.num_sequences,
            expected=f"at most {whole}",
            remedy="lower it, or data.seq_len",
        )
    return sequences


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is known once the source has been opened.

    Attributes:
        data: the section.
        config: the section.
        targets: by name.
        sequences: the corpus.
        source: the model's folder.
        origin: where it came from, for the records.
    """

    data: DataConfig
    config: PruneConfig
    targets: dict[str, TargetConfig]
    sequences: SequenceData
    source: Source
    origin: dict[str, Any]

    def run(self) -> PruneReport:
        """Score the source, and cut, measure and write every target."""
        from distill_pretrain.pruning.folder import require_replaceable, write_folder
        from distill_pretrain.pruning.shapes import num_parameters
        from distill_pretrain.reports.pruning import PruneReport

        identities = {name: self._identity(target) for name, target in self.targets.items()}
        for name, identity in identities.items():
            require_replaceable(self.config.output_dir / name, identity)
        reported, text = self._reported()
        with progress(None, "measuring", unit="passes") as bar:
            pruner = self._pruner(reported, lambda what: bar.advance(of=what))
            models: dict[str, PrunedModel] = {}
            for name, target in self.targets.items():
                models[name] = pruned = pruner.prune(name, target)
                write_folder(
                    self.config.output_dir / name,
                    self.source,
                    self.source.config_of(pruned.model),
                    pruned.cuts,
                    self._record(identities[name], pruned, pruner, text),
                )
        vocab_size = self.source.vocab_size
        report = PruneReport(
            source=f"{self.config.source}",
            shape=pruner.shape,
            parameters=num_parameters(self.source.model, vocab_size=vocab_size),
            loss=pruner.loss,
            text=text,
            scores=pruner.scores,
            loss_without=pruner.loss_without,
            models=models,
        )
        _write_report(report, self.config.output_dir)
        return report

    def _pruner(self, reported: list[Batch], told: Callable[[str], None]) -> Pruner:
        from distill_pretrain.processes.process import local_device
        from distill_pretrain.pruning.pruner import Pruner

        return Pruner(
            self.source,
            self.config,
            scored=self._batches(self.sequences, self._chosen()),
            reported=reported,
            vocab_size=self.sequences.vocab_size,
            device=local_device(),
            told=told,
        )

    def _chosen(self) -> list[int]:
        """Choose the sequences that are scored, in random order: whole ones among those that the recipe uses."""
        import numpy as np

        whole = _whole_sequences(self.sequences)
        generator = np.random.Generator(np.random.Philox(self.config.seed))
        chosen = generator.choice(whole, size=self.config.num_sequences, replace=False)
        return [int(number) for number in chosen]

    def _reported(self) -> tuple[list[Batch], str]:
        """Return what the report's losses are measured on, and what that is in words."""
        from distill_pretrain.data.sources import open_sequences, require_one_tokenizer

        count, tokens = self.config.loss_sequences, self.data.held_out_tokens
        if tokens is None:
            chosen = self._chosen()[:count]
            text = f"{len(chosen)} sequences of {self.data.seq_len} tokens that were also scored"
            return self._batches(self.sequences, chosen), text
        held_out = open_sequences(_as_stream(self.data), tokens)
        require_one_tokenizer(
            self.sequences,
            self.data.tokens,
            held_out,
            what="the corpora",
            where="data.held_out_tokens",
        )
        count = min(count, held_out.plan.num_sequences)
        text = f"{count} held-out sequences of {self.data.seq_len} tokens"
        return self._batches(held_out, list(range(count))), text

    def _batches(self, sequences: SequenceData, numbers: list[int]) -> list[Batch]:
        import torch

        size = self.config.micro_batch_size
        batches = []
        for start in range(0, len(numbers), size):
            tokens, labels = sequences.plan.read(numbers[start : start + size])
            batches.append((torch.from_numpy(tokens).long(), torch.from_numpy(labels).long()))
        return batches

    def _identity(self, target: TargetConfig) -> dict[str, Any]:
        """Return all that decides a target's folder."""
        settings = self.config.model_dump(
            mode="json",
            include={
                "num_sequences",
                "loss_sequences",
                "candidates",
                "micro_batch_size",
                "seed",
                "dtype",
                "rescale_norms",
            },
        )
        return {
            "version": _VERSION,
            "source_sha256": self.origin["sha256"],
            "sequence_plan": self.sequences.plan.plan_id,
            "num_sequences": self.sequences.num_sequences,
            "vocab_size": self.sequences.vocab_size,
            "target": target.model_dump(mode="json"),
            "settings": settings,
        }

    def _record(
        self, identity: dict[str, Any], pruned: PrunedModel, pruner: Pruner, text: str
    ) -> dict[str, Any]:
        """Return the contents of prune.json."""
        return {
            "identity": identity,
            "source": {**self.origin, **asdict(pruner.shape)},
            "shape": asdict(pruned.shape),
            "parameters": pruned.parameters,
            "loss": {"on": text, "source": pruner.loss, "pruned": pruned.loss},
            "block_influence": pruner.scores.as_dict()["block_influence"],
            "kept": pruned.kept.as_dict(),
            "code_version": __version__,
        }


def _as_stream(data: DataConfig) -> DataConfig:
    """Return the section with a corpus whose sequences are full but for the last: scores are means over them."""
    return data.model_copy(update={"documents": "joined", "packing": "cut"})


def _whole_sequences(sequences: SequenceData) -> int:
    """Count the recipe's sequences that have no padding; these come first."""
    plan = sequences.plan
    return min(sequences.num_sequences, plan.num_tokens // plan.seq_len)


def _write_report(report: PruneReport, folder: Path) -> None:
    import importlib.util

    from distill_pretrain.files.atomic import publish_bytes
    from distill_pretrain.reports.pruning import draw_scores, pruning_report, scores_file

    publish_bytes(folder / "scores.json", (json.dumps(scores_file(report)) + "\n").encode())
    has_picture = importlib.util.find_spec("matplotlib") is not None
    if has_picture:
        publish_bytes(folder / "scores.png", draw_scores(report))
    else:
        _log.warning("no picture of the scores: pip install 'distill-pretrain[eval]'")
    text = pruning_report(report, has_picture=has_picture)
    publish_bytes(folder / "report.md", text.encode())
    say(text)
    say(f"models are in {folder}: {', '.join(report.models)}")
