"""How much of the teacher's distribution the targets of top-k and top-p keep, and what leaving out the rest costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.formats.cache_plan import CachePlan
from distill_pretrain.teacher.scoring import SampledBatch

ENOUGH_POSITIONS = 8192
"""After so many it is said; a capture may take weeks."""
LOW_MASS = 0.9


class KeptMass:
    """Measures while a process captures, and says once for every cache whose targets are cut off.

    Args:
        plans: of the caches, by folder.
        say: prints one line.
    """

    def __init__(self, plans: Mapping[Path, CachePlan], say: Callable[[str], None]) -> None:
        self._say = say
        self._open = {
            id(plan): _Sums(folder, plan)
            for folder, plan in plans.items()
            if plan.kind == "logprobs"
        }

    def look(self, plans: Sequence[CachePlan], batch: SampledBatch) -> None:
        """Take a batch into account, with its plans."""
        for plan, targets in zip(plans, batch.sets, strict=True):
            sums = self._open.get(id(plan))
            if sums is not None:
                sums.add(targets)
                if sums.positions >= ENOUGH_POSITIONS:
                    self._say(sums.line())
                    del self._open[id(plan)]

    def close(self) -> None:
        """Say what was measured on fewer positions."""
        for sums in self._open.values():
            if sums.positions:
                self._say(sums.line())
        self._open = {}


class _Sums:
    def __init__(self, folder: Path, plan: CachePlan) -> None:
        self._folder, self._plan = folder, plan
        self.positions, self._mass, self._bias = 0, 0.0, 0.0

    def add(self, targets: RaggedTargets) -> None:
        lengths = targets.entries_per_token[targets.entries_per_token > 0]
        if not len(lengths):
            return
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        mass = np.add.reduceat(targets.probs().astype(np.float64), starts)
        self.positions += len(mass)
        self._mass += float(mass.sum())
        self._bias -= float(np.log(mass).sum())

    def line(self) -> str:
        mass, bias = self._mass / self.positions, max(0.0, self._bias / self.positions)
        sampler = self._plan.sampler["name"]
        said = (
            f"{self._folder}: {sampler} keeps {mass:.1%} of the teacher's mass (mean of {self.positions:,} positions); "
            f"scaled to 1, what is kept is {bias:.2f} nats off the teacher's distribution"
        )
        if mass >= LOW_MASS:
            return said
        return (
            f"warning: {said}, and students learn that bias; remedy: raise num_draws"
            f"{' or top_p' if sampler == 'topp' else ''}, or sample (capture.sampler=systematic), which has no bias"
        )
