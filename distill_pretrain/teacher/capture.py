"""The capture job: teacher over the plan's sequences, sampled, into one cache or several.

Any number of processes, started together or not, work on the caches: each takes shards that nobody owns. What a
shard holds depends on its plan alone, so the bytes are the same whoever writes it, however often it was killed, and
whichever other caches are written from the same pass of the teacher.

Shapes: B sequences, L positions, V vocabulary.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from distill_pretrain import __version__
from distill_pretrain.contracts import LogitsEngine
from distill_pretrain.data.sources import SequenceData
from distill_pretrain.formats.cache_plan import CachePlan
from distill_pretrain.formats.cache_writer import CacheWriter, ShardWriter
from distill_pretrain.formats.codecs import codec_number
from distill_pretrain.formats.manifest import Manifest
from distill_pretrain.sampling import RNG_NAME
from distill_pretrain.teacher.config import CaptureConfig, TargetSetConfig
from distill_pretrain.teacher.scoring import ScoredBatch, score

Progress = Callable[[int], None]
"""Called with the number of positions just written."""


def software_versions(engine_kind: str) -> dict[str, str]:
    """Versions that can move a teacher's float rounding, and ours."""
    packages = ["torch", "numpy", "transformers" if engine_kind == "hf" else "megatron-core"]
    versions = {name: version(name) for name in packages}
    return {**versions, "distill-pretrain": __version__, "machine": platform.machine()}


def make_plans(
    sequences: SequenceData, capture: CaptureConfig, teacher_identity: dict[str, Any]
) -> dict[Path, CachePlan]:
    """Everything that decides the bytes of every cache, by the cache's folder."""
    fingerprint = sequences.index.fingerprint
    wanted = capture.num_sequences or sequences.num_sequences
    return {
        folder: CachePlan(
            sequence_plan_id=sequences.plan.plan_id,
            tokens={"bin_sha256": fingerprint.bin_sha256, "idx_sha256": fingerprint.idx_sha256},
            tokenizer_sha256=sequences.tokenizer_sha256,
            vocab_size=sequences.vocab_size,
            seq_len=sequences.plan.seq_len,
            num_sequences=min(wanted, sequences.plan.num_sequences),
            sampler=_described(targets),
            teacher=teacher_identity,
            micro_batch_size=capture.micro_batch_size,
            block_tokens=capture.block_tokens,
            shard_sequences=capture.shard_sequences,
            codec=codec_number(capture.codec, targets.sampler),
            software=software_versions(teacher_identity["kind"]),
        )
        for folder, targets in capture.targets.items()
    }


def _described(targets: TargetSetConfig) -> dict[str, Any]:
    """The key `sampler` of a plan."""
    described = {
        "name": targets.sampler,
        "num_draws": targets.num_draws,
        "temperature": 1.0,
        "seed": targets.seed,
        "rng": RNG_NAME,
    }
    return described if targets.top_p is None else {**described, "top_p": targets.top_p}


def pending_shards(writers: Sequence[CacheWriter]) -> dict[int, list[CacheWriter]]:
    """Shards that some cache lacks, in order, and the caches that lack them."""
    pending: dict[int, list[CacheWriter]] = {}
    for writer in writers:
        for shard in writer.pending():
            pending.setdefault(shard, []).append(writer)
    return dict(sorted(pending.items()))


def capture_shards(
    writers: Sequence[CacheWriter],
    engine: LogitsEngine,
    sequences: SequenceData,
    *,
    first_shard: int,
    progress: Progress,
) -> None:
    """Write every shard that no other process owns, until a pass finds none.

    Args:
        writers: the caches; their plans differ in sampler and codec only.
        engine: the teacher.
        sequences: what it scores.
        first_shard: where this process starts looking, so that processes started together spread out.
        progress: told of positions scored and written.

    Raises:
        TeacherError: NaN or infinite logits, naming the sequences; shards written so far are kept.
    """
    worked = True
    while worked:
        worked = False
        pending = pending_shards(writers)
        for shard in sorted(pending, key=lambda number: (number < first_shard, number)):
            with ExitStack() as owned:
                claimed = _claim(pending[shard], shard, owned)
                if not claimed:
                    continue
                _fill_shards(claimed, engine, sequences, progress)
                for mine in claimed:
                    mine.shard.finish()
            worked = True


def finish_capture(writers: Sequence[CacheWriter]) -> dict[Path, Manifest]:
    """Publish the manifests of finished caches, by folder.

    A cache that other processes still write is left out: the last of them publishes it.
    """
    return {w.folder: w.publish_manifest() for w in writers if not w.pending()}


class _Claimed(NamedTuple):
    """A shard of one cache that this process owns."""

    plan: CachePlan
    shard: ShardWriter


def _claim(lacking: Sequence[CacheWriter], shard: int, owned: ExitStack) -> list[_Claimed]:
    """Ownership of one shard in the caches that lack it, given up when `owned` closes.

    The first of them decides: whoever owns the shard there takes it in the others too, so that no two processes score
    the same sequences. A later cache may refuse, where a capture of that cache alone works beside this one.
    """
    claimed: list[_Claimed] = []
    for writer in lacking:
        mine = writer.claim(shard)
        if mine is not None:
            claimed.append(_Claimed(writer.plan, owned.enter_context(mine)))
        elif not claimed:
            break
    return claimed


def _fill_shards(
    claimed: Sequence[_Claimed], engine: LogitsEngine, sequences: SequenceData, progress: Progress
) -> None:
    """Score and append the blocks that are missing from one shard of every cache.

    Micro-batches start at fixed sequences of the shard, so a resumed shard sees the batch shapes of an unbroken
    one: float rounding depends on them. Sampling, coding and writing one batch overlap the teacher's next.

    Args:
        claimed: shards of one number in different caches.
        engine: the teacher.
        sequences: what it scores.
        progress: told of positions scored and written.
    """
    plan, shard = claimed[0]
    first, count = plan.shard_range(shard.shard)
    next_block = min(mine.shard.next_block for mine in claimed)
    done = shard.place(next_block)[0] - first if next_block < shard.num_blocks else count
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
                before = worker.submit(_append_batch, claimed, batch, progress)
        finally:
            if before is not None:
                before.result()


def _append_batch(claimed: Sequence[_Claimed], batch: ScoredBatch, progress: Progress) -> None:
    """Append a batch's blocks, each where it is the next one: resumed shards may be at different blocks."""
    shard = claimed[0].shard
    while True:
        block = min(mine.shard.next_block for mine in claimed)
        if block == shard.num_blocks:
            return
        sequence, offset, length = shard.place(block)
        if sequence >= batch.stop:
            return
        due = [mine for mine in claimed if mine.shard.next_block == block]
        targets, tokens = batch.sample([mine.plan for mine in due], sequence, offset, length)
        for mine, its_targets in zip(due, targets, strict=True):
            mine.shard.append(its_targets, tokens)
        progress(length)
