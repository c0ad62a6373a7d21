"""Codec tables of new caches, from a pilot: targets of the first sequences of the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from distill_pretrain.cache.codec.hc.build import build_tables
from distill_pretrain.cache.codec.hc.tables import HcTables
from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.teacher.scoring import SampledBatch

Score = Callable[[int, int, Sequence[CachePlan]], SampledBatch]
"""(first sequence, how many, plans) -> their targets."""


def pilot_tables(score: Score, plans: Sequence[CachePlan], *, num_tokens: int) -> list[HcTables]:
    """Fit codec tables for each of some plans to targets that one pass of the teacher gives.

    Args:
        score: the teacher.
        plans: of the caches; they differ in sampler and codec only.
        num_tokens: positions wanted; at most an eighth of the plan's sequences are used, and at least one
            micro-batch.
    """
    plan = plans[0]
    wanted = min(-(-num_tokens // plan.seq_len), plan.num_sequences // 8)
    batches = max(1, wanted // plan.micro_batch_size)
    pilots: list[list[RaggedTargets]] = [[] for _ in plans]
    for number in range(batches):
        first = number * plan.micro_batch_size
        size = min(plan.micro_batch_size, plan.num_sequences - first)
        batch = score(first, size, plans)
        for sequence in range(first, batch.stop):
            for index, pilot in enumerate(pilots):
                pilot.append(batch.targets(index, sequence, 0, plan.seq_len))
    return [
        build_tables(pilot, kind=p.kind, num_draws=p.num_draws, vocab_size=p.vocab_size)
        for pilot, p in zip(pilots, plans, strict=True)
    ]
