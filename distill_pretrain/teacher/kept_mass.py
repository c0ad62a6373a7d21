"""A capture says how much of the teacher's distribution the targets of top-k and top-p keep."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.data.kept_mass import KeptShare
from distill_pretrain.processes.logs import ANY_RANK
from distill_pretrain.sampling.kinds import SAMPLERS
from distill_pretrain.teacher.scoring import SampledBatch

_log = logging.getLogger(__name__)

ENOUGH_POSITIONS = 8192
"""After so many it is said; a capture may take weeks."""


class KeptMass:
    """Measures while a process captures, and says once for every cache whose targets are cut off.

    Args:
        plans: of the caches, by folder.
    """

    def __init__(self, plans: Mapping[Path, CachePlan]) -> None:
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
                    sums.log()
                    del self._open[id(plan)]

    def close(self) -> None:
        """Say what was measured on fewer positions."""
        for sums in self._open.values():
            if sums.positions:
                sums.log()
        self._open = {}


class _Sums(KeptShare):
    def __init__(self, folder: Path, plan: CachePlan) -> None:
        super().__init__()
        self._folder, self._plan = folder, plan

    def log(self) -> None:
        level = logging.WARNING if self.is_low else logging.INFO
        _log.log(level, self._line(), extra=ANY_RANK)

    def _line(self) -> str:
        sampler = self._plan.sampler["name"]
        said = (
            f"{self._folder}: {sampler} keeps {self.mean:.1%} of the teacher's mass (mean of {self.positions:,} "
            f"positions); scaled to 1, what is kept is {self.bias:.2f} nats off the teacher's distribution"
        )
        if not self.is_low:
            return said
        own = "".join(f" or {setting}" for setting in SAMPLERS[sampler].own_settings)
        return (
            f"{said}, and students learn that bias; remedy: raise num_draws"
            f"{own}, or sample (capture.sampler=systematic), which has no bias"
        )
