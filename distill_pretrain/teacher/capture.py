"""The capture job: teacher over the plan's sequences, sampled, into one cache or several.

Any number of replicas of the teacher, in one job or in several, started together or not, work on the caches: the leader
of each takes shards that nobody owns. What a shard holds depends on its plan alone, so the bytes are the same whoever
writes it, however often it was killed, and whichever other caches are written from the same pass of the teacher.

Shapes: B sequences, L positions, V vocabulary.
"""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distill_pretrain import __version__
from distill_pretrain.cache.codec.registry import codec_number
from distill_pretrain.cache.manifest import Manifest
from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.cache.shard_writer import ShardWriter
from distill_pretrain.cache.writer import CacheWriter
from distill_pretrain.data.sources import SequenceData
from distill_pretrain.sampling.philox import RNG_NAME
from distill_pretrain.teacher.config import CaptureConfig, TargetSetConfig
from distill_pretrain.teacher.gate import BatchFigures, SanityGate
from distill_pretrain.teacher.kept_mass import KeptMass
from distill_pretrain.teacher.replica_group import ReplicaGroup
from distill_pretrain.teacher.scoring import SampledBatch
from distill_pretrain.teacher.telemetry import CaptureLog, Stopwatch, Written

QUEUED_BATCHES = 2
"""Most batches that wait to be written."""


class CaptureWatch:
    """What looks on while a replica's leader captures.

    Args:
        gate: judges the teacher.
        log: telemetry, or None.
        kept: measures what cut-off targets keep, or None.
        stopwatch: seconds by stage.
        progress: told of positions written.
    """

    def __init__(
        self,
        gate: SanityGate,
        *,
        log: CaptureLog | None = None,
        kept: KeptMass | None = None,
        stopwatch: Stopwatch | None = None,
        progress: Callable[[int], None] = lambda positions: None,
    ) -> None:
        self.stopwatch = stopwatch or Stopwatch()
        self._gate = gate
        self._log = log
        self._kept = kept
        self._progress = progress

    def look(
        self, plans: Sequence[CachePlan], batch: SampledBatch, labels: npt.NDArray[np.int32]
    ) -> BatchFigures:
        """Judge a batch by the plan whose targets say most; see `SanityGate.look`."""
        if self._kept is not None:
            self._kept.look(plans, batch)
        index = max(
            range(len(plans)), key=lambda i: (plans[i].kind == "counts", plans[i].num_draws)
        )
        with self.stopwatch.running("judging"):
            return self._gate.look(batch, index, labels)

    def wrote(self, written: Written, queue_depth: int) -> None:
        """Count a batch."""
        if self._log is not None:
            self._log.add(written, queue_depth)
        self._progress(written.positions)


def software_versions(*engine_kinds: str) -> dict[str, str]:
    """Return the versions that can move the float rounding of teachers of these kinds, and ours."""
    of_engine = {
        "megatron": ["megatron-core"],
        "hf": ["transformers"],
        "deepspeed": ["transformers", "deepspeed"],
    }
    used = [name for kind in engine_kinds for name in of_engine.get(kind, [])]
    versions = {name: version(name) for name in ["torch", "numpy", *used]}
    return {**versions, "distill-pretrain": __version__, "machine": platform.machine()}


def make_plans(
    sequences: SequenceData, capture: CaptureConfig, teacher_identity: dict[str, Any]
) -> dict[Path, CachePlan]:
    """Decide everything that decides the bytes of every cache, by the cache's folder."""
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
            micro_batch_size=capture.sequences_per_pass(sequences.plan.seq_len),
            block_tokens=capture.block_tokens,
            shard_sequences=capture.shard_sequences,
            codec=codec_number(capture.codec, targets.sampler),
            software=software_versions(*_kinds(teacher_identity)),
        )
        for folder, targets in capture.targets.items()
    }


def _kinds(teacher_identity: dict[str, Any]) -> list[str]:
    """The engines of a teacher, or of those of a mixture."""
    return [one["kind"] for one in teacher_identity.get("teachers", [teacher_identity])]


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
    """Return the shards that some cache lacks, in order, and the caches that lack them."""
    pending: dict[int, list[CacheWriter]] = {}
    for writer in writers:
        for shard in writer.pending():
            pending.setdefault(shard, []).append(writer)
    return dict(sorted(pending.items()))


def capture_shards(
    writers: Sequence[CacheWriter], group: ReplicaGroup, *, first_shard: int, watch: CaptureWatch
) -> None:
    """Write every shard that no other process owns, until a pass finds none; on the replica's leader.

    Args:
        writers: the caches; their plans differ in sampler and codec only.
        group: the replica.
        first_shard: where this replica starts looking, so that replicas started together spread out.
        watch: looks at every batch before it is written, and is told of what was.

    Raises:
        TeacherError: NaN or infinite logits, naming the sequences, or a teacher that cannot be sound; shards written
            so far are kept.
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
                _fill_shards(claimed, group, watch)
                with watch.stopwatch.running("writing"):
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


def _fill_shards(claimed: Sequence[_Claimed], group: ReplicaGroup, watch: CaptureWatch) -> None:
    """Score and append the blocks that are missing from one shard of every cache.

    Micro-batches start at fixed sequences of the shard, so a resumed shard sees the batch shapes of an unbroken
    one: float rounding depends on them. Coding and writing overlap the teacher's next batches.

    Args:
        claimed: shards of one number in different caches.
        group: the replica.
        watch: see `capture_shards`.
    """
    plan, shard = claimed[0]
    first, count = plan.shard_range(shard.shard)
    next_block = min(mine.shard.next_block for mine in claimed)
    done = shard.place(next_block)[0] - first if next_block < shard.num_blocks else count
    starts = range(
        done // plan.micro_batch_size * plan.micro_batch_size, count, plan.micro_batch_size
    )
    with _Queue() as queue:
        for start in starts:
            size = min(plan.micro_batch_size, count - start)
            with watch.stopwatch.running("scoring"):
                batch = group.score(first + start, size, [mine.plan for mine in claimed])
            labels = group.sequences.plan.unmasked.read(np.arange(batch.first, batch.stop))[1]
            with watch.stopwatch.running("waiting"):
                queue.put(partial(_append_batch, claimed, batch, labels, watch, queue))


def _append_batch(
    claimed: Sequence[_Claimed],
    batch: SampledBatch,
    labels: npt.NDArray[np.int32],
    watch: CaptureWatch,
    queue: _Queue,
) -> None:
    """Append a batch's blocks, each where it is the next one: resumed shards may be at different blocks."""
    figures = watch.look([mine.plan for mine in claimed], batch, labels)
    shard = claimed[0].shard
    positions, before = 0, sum(mine.shard.size for mine in claimed)
    with watch.stopwatch.running("writing"):
        while True:
            block = min(mine.shard.next_block for mine in claimed)
            if block == shard.num_blocks:
                break
            sequence, offset, length = shard.place(block)
            if sequence >= batch.stop:
                break
            assert sequence >= batch.first, (sequence, batch.first)
            tokens = batch.tokens[sequence - batch.first, offset : offset + length]
            for index, mine in enumerate(claimed):
                if mine.shard.next_block == block:
                    mine.shard.append(batch.targets(index, sequence, offset, length), tokens)
            positions += length
    watch.wrote(
        Written(
            shard=shard.shard,
            first=batch.first,
            sequences=len(labels),
            positions=positions,
            measured=figures.positions,
            hits=figures.hits,
            entropy=figures.entropy,
            size=sum(mine.shard.size for mine in claimed) - before,
        ),
        queue.depth,
    )


class _Queue:
    """Batches on their way to the disk, in order, by one thread; few, so that a slow disk holds the teacher back.

    After an error nothing more is done: a block may only follow the one before it.
    """

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, "cache writer")
        self._waiting: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> _Queue:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for what is on its way; its error is raised unless there is one already."""
        with self._worker:
            try:
                while self._waiting:
                    self._waiting.popleft().result()
            except Exception:
                if kind is None:
                    raise

    def put(self, action: Callable[[], None]) -> None:
        """Queue an action, once there is room; raises what an earlier one raised."""
        while len(self._waiting) >= QUEUED_BATCHES or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._worker.submit(self._do, action))

    def _do(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except BaseException:
            self._failed = True
            raise

    @property
    def depth(self) -> int:
        """Actions not done."""
        return sum(not future.done() for future in tuple(self._waiting))
