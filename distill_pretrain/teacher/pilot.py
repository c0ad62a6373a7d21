"""Codec tables of new caches, from a pilot: targets of the first sequences of the plan."""

from __future__ import annotations

from collections.abc import Sequence

from distill_pretrain.contracts import LogitsEngine, RaggedTargets
from distill_pretrain.data.sources import SequenceData
from distill_pretrain.formats.cache_plan import CachePlan
from distill_pretrain.formats.hc_build import build_tables
from distill_pretrain.formats.hc_tables import HcTables
from distill_pretrain.teacher.scoring import score


def pilot_tables(
    engine: LogitsEngine,
    sequences: SequenceData,
    plans: Sequence[CachePlan],
    *,
    num_tokens: int,
) -> list[HcTables]:
    """Codec tables for each of some plans, fitted to targets that one pass of the teacher gives.

    Args:
        engine: the teacher.
        sequences: what it scores.
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
        batch = score(engine, sequences, first, size)
        for sequence in range(first, batch.stop):
            for pilot, targets in zip(
                pilots, batch.sample(plans, sequence, 0, plan.seq_len)[0], strict=True
            ):
                pilot.append(targets)
    return [
        build_tables(pilot, kind=p.kind, num_draws=p.num_draws, vocab_size=p.vocab_size)
        for pilot, p in zip(pilots, plans, strict=True)
    ]
