"""The subject of an evaluation: models, a teacher and a cache, opened, and the held-out text they are scored on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distill_pretrain.cache.reader import CacheReader
from distill_pretrain.contracts import LogitsEngine, Replica, TeacherEngine
from distill_pretrain.data.sources import SequenceData
from distill_pretrain.eval.chunks import replica_of
from distill_pretrain.eval.heldout import TEACHER, HeldOutPlan, evaluate
from distill_pretrain.eval.metrics import ModelScores, ScoreSettings
from distill_pretrain.processes.env import launch_rank, launch_world_size
from distill_pretrain.processes.process import local_device


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The models of an evaluation and the held-out text they are scored on; every process has all, or its part of them.

    Attributes:
        held_out: the text.
        num_sequences: S; the text's first S sequences are scored.
        engines: name -> model, without the teacher.
        paths: name -> folder of each model, and of the teacher under "teacher".
        teacher: the model that the others are compared with, and that is scored too; None where there is none.
        cache: stored targets of the held-out text; None where there are none.
        settings: calibration bins and draft lengths.
    """

    held_out: SequenceData
    num_sequences: int
    engines: Mapping[str, LogitsEngine]
    paths: Mapping[str, Path]
    teacher: LogitsEngine | TeacherEngine | None
    cache: CacheReader | None
    settings: ScoreSettings

    @property
    def models(self) -> dict[str, LogitsEngine | TeacherEngine]:
        """Every model by its name, the teacher last."""
        return (
            dict(self.engines) if self.teacher is None else {**self.engines, TEACHER: self.teacher}
        )

    def inputs(self) -> dict[str, Any]:
        """Return all that decides the scores, as JSON values."""
        reference = None
        if self.teacher is not None:
            reference = {"path": str(self.paths[TEACHER]), "identity": self.teacher.identity}
        return {
            "held_out": self.held_out.index.fingerprint.as_dict(),
            "sequence_plan_id": self.held_out.plan.plan_id,
            "seq_len": self.held_out.plan.seq_len,
            "vocab_size": self.held_out.vocab_size,
            "num_sequences": self.num_sequences,
            "models": {
                name: {"path": str(self.paths[name]), "identity": engine.identity}
                for name, engine in self.engines.items()
            },
            "teacher": reference,
            "cache": None if self.cache is None else cache_identity(self.cache),
            "ece_bins": self.settings.ece_bins,
            "draft_lengths": list(self.settings.draft_lengths),
        }

    @property
    def replica(self) -> Replica:
        """The processes that score the same sequences: those that hold the models, or the teacher, together."""
        for engine in self.models.values():
            found = replica_of(engine)
            if found.group is not None:
                return found
        return Replica(leader=launch_rank(), number=launch_rank(), count=launch_world_size())

    @property
    def share(self) -> int:
        """The number of the text's sequences that a process scores; see `share_of`."""
        return self.share_of(self.num_sequences)

    def share_of(self, num_sequences: int) -> int:
        """Return the number of so many sequences that a process scores; some processes may have one less."""
        return -(-num_sequences // self.replica.count)

    def on(self, other: SequenceData, num_sequences: int) -> Subject:
        """Return the same models over the first sequences of another text, without a cache."""
        return replace(self, held_out=other, num_sequences=num_sequences, cache=None)

    def scores(
        self, *, micro_batch_size: int, progress: Callable[[int], None]
    ) -> dict[str, ModelScores]:
        """Score every model; each process of the job calls this, and scores its share of the sequences.

        Args:
            micro_batch_size: sequences of one forward pass; it does not change the scores.
            progress: called with the number of sequences that this process has just scored.

        Returns:
            Name -> scores, the same on every process.

        Raises:
            DistillPretrainError: see `heldout.evaluate`.
        """
        return self.scores_on(
            self.held_out.plan,
            cache=self.cache,
            num_sequences=self.num_sequences,
            micro_batch_size=micro_batch_size,
            progress=progress,
        )

    def scores_on(
        self,
        plan: HeldOutPlan,
        *,
        cache: CacheReader | None = None,
        num_sequences: int | None = None,
        micro_batch_size: int,
        progress: Callable[[int], None],
    ) -> dict[str, ModelScores]:
        """Score every model as `scores` does, on sequences of the caller's; None takes all of them."""
        return evaluate(
            dict(self.engines),
            self.teacher,
            plan,
            cache=cache,
            settings=self.settings,
            num_sequences=num_sequences,
            micro_batch_size=micro_batch_size,
            replica=self.replica,
            all_reduce_sum=_all_reduce_sum,
            progress=progress,
        )


def cache_identity(cache: CacheReader) -> dict[str, Any]:
    """Return what tells one cache from another, as JSON values."""
    return {
        "location": cache.location,
        "manifest_sha256": cache.manifest_sha256,
        "sampler": cache.plan.sampler,
    }


def _all_reduce_sum(state: torch.Tensor) -> None:
    moved = state.to(local_device())
    dist.all_reduce(moved)
    state.copy_(moved)
