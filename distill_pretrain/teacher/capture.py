"""The capture job: teacher over the plan's sequences, sampled, into a cache.

Any number of processes, started together or not, work on one cache: each takes shards that nobody owns. What a
shard holds depends on the plan alone, so the bytes are the same whoever writes it and however often it was killed.

Shapes: B sequences, L positions, V vocabulary.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

from distill_pretrain import __version__
from distill_pretrain.contracts import LogitsEngine, RaggedTargets
from distill_pretrain.data.sources import SequenceData
from distill_pretrain.formats.cache_plan import CachePlan
from distill_pretrain.formats.cache_writer import CacheWriter, ShardWriter
from distill_pretrain.formats.codecs import codec_number
from distill_pretrain.formats.hc_build import build_tables
from distill_pretrain.formats.hc_tables import HcTables
from distill_pretrain.formats.manifest import Manifest
from distill_pretrain.sampling import RNG_NAME
from distill_pretrain.teacher.config import CaptureConfig
from distill_pretrain.teacher.scoring import ScoredBatch, score

Progress = Callable[[int], None]
"""Called with the number of positions just written."""


def software_versions(engine_kind: str) -> dict[str, str]:
    """Versions that can move a teacher's float rounding, and ours."""
    packages = ["torch", "numpy", "transformers" if engine_kind == "hf" else "megatron-core"]
    versions = {name: version(name) for name in packages}
    return {**versions, "distill-pretrain": __version__, "machine": platform.machine()}


def make_plan(
    sequences: SequenceData, capture: CaptureConfig, teacher_identity: dict[str, Any]
) -> CachePlan:
    """Everything that decides the cache's bytes."""
    fingerprint = sequences.index.fingerprint
    wanted = capture.num_sequences or sequences.num_sequences
    return CachePlan(
        sequence_plan_id=sequences.plan.plan_id,
        tokens={"bin_sha256": fingerprint.bin_sha256, "idx_sha256": fingerprint.idx_sha256},
        tokenizer_sha256=sequences.tokenizer_sha256,
        vocab_size=sequences.vocab_size,
        seq_len=sequences.plan.seq_len,
        num_sequences=min(wanted, sequences.plan.num_sequences),
        sampler={
            "name": capture.sampler,
            "num_draws": capture.num_draws,
            "temperature": 1.0,
            "seed": capture.seed,
            "rng": RNG_NAME,
        },
        teacher=teacher_identity,
        micro_batch_size=capture.micro_batch_size,
        block_tokens=capture.block_tokens,
        shard_sequences=capture.shard_sequences,
        codec=codec_number(capture.codec, capture.sampler),
        software=software_versions(teacher_identity["kind"]),
    )


def capture_shards(
    writer: CacheWriter,
    engine: LogitsEngine,
    sequences: SequenceData,
    *,
    first_shard: int,
    progress: Progress,
) -> None:
    """Write every shard that no other process owns, until a pass finds none.

    Args:
        writer: the cache.
        engine: the teacher.
        sequences: what it scores.
        first_shard: where this process starts looking, so that processes started together spread out.
        progress: told of positions written.

    Raises:
        TeacherError: NaN or infinite logits, naming the sequences; shards written so far are kept.
    """
    worked = True
    while worked:
        worked = False
        pending = writer.pending()
        split = sum(shard < first_shard for shard in pending)
        for shard in pending[split:] + pending[:split]:
            claimed = writer.claim(shard)
            if claimed is None:
                continue
            with claimed:
                _fill_shard(claimed, writer.plan, engine, sequences, progress)
                claimed.finish()
            worked = True


def finish_capture(writer: CacheWriter) -> Manifest | None:
    """Publish the manifest; None while other processes still write: the last of them publishes."""
    return None if writer.pending() else writer.publish_manifest()


def _fill_shard(
    shard: ShardWriter,
    plan: CachePlan,
    engine: LogitsEngine,
    sequences: SequenceData,
    progress: Progress,
) -> None:
    """Score and append the blocks that are missing.

    Micro-batches start at fixed sequences of the shard, so a resumed shard sees the batch shapes of an unbroken
    one: float rounding depends on them. Sampling, coding and writing one batch overlap the teacher's next.
    """
    first, count = plan.shard_range(shard.shard)
    done = (
        shard.place(shard.next_block)[0] if shard.next_block < shard.num_blocks else first + count
    ) - first
    starts = range(
        done // plan.micro_batch_size * plan.micro_batch_size, count, plan.micro_batch_size
    )
    with ThreadPoolExecutor(1, "cache writer") as worker:
        before: Future[None] | None = None
        try:
            for start in starts:
                size = min(plan.micro_batch_size, count - start)
                batch = score(engine, sequences, first + start, size)
                if before is not None:
                    before.result()
                before = worker.submit(_append_batch, shard, plan, batch, progress)
        finally:
            if before is not None:
                before.result()


def _append_batch(
    shard: ShardWriter, plan: CachePlan, batch: ScoredBatch, progress: Progress
) -> None:
    while shard.next_block < shard.num_blocks:
        sequence, offset, length = shard.place(shard.next_block)
        if sequence >= batch.stop:
            break
        shard.append(*batch.sample(plan, sequence, offset, length))
        progress(length)


def pilot_tables(
    engine: LogitsEngine, sequences: SequenceData, plan: CachePlan, *, num_tokens: int
) -> HcTables:
    """Codec tables fitted to the targets of the first sequences of the plan.

    Args:
        engine: the teacher.
        sequences: what it scores.
        plan: of the cache.
        num_tokens: positions wanted; at most an eighth of the plan's sequences are used, and at least one
            micro-batch.
    """
    wanted = min(-(-num_tokens // plan.seq_len), plan.num_sequences // 8)
    batches = max(1, wanted // plan.micro_batch_size)

    def targets() -> Iterator[RaggedTargets]:
        for number in range(batches):
            first = number * plan.micro_batch_size
            size = min(plan.micro_batch_size, plan.num_sequences - first)
            batch = score(engine, sequences, first, size)
            for sequence in range(first, batch.stop):
                yield batch.sample(plan, sequence, 0, plan.seq_len)[0]

    return build_tables(
        targets(), kind=plan.kind, num_draws=plan.num_draws, vocab_size=plan.vocab_size
    )
