"""What a training job finds out about its loss and its targets before it builds a student."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from distill_pretrain.cache.reader import CacheReader
from distill_pretrain.contracts import LogitsEngine
from distill_pretrain.data.canary import run_canary
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.kept_mass import KeptShare
from distill_pretrain.data.sources import SequenceData, TrainingSource
from distill_pretrain.errors import ConfigError, TeacherError
from distill_pretrain.kernels.sparse_kd.launch import CAPPED, SOURCE
from distill_pretrain.losses.backend import LossBackend, choose_backend
from distill_pretrain.losses.config import ObjectiveConfig
from distill_pretrain.losses.schedule import extremes
from distill_pretrain.losses.sparse_kd import require_entries_fit
from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.processes.process import local_device, on_first_rank
from distill_pretrain.train.config import TrainConfig

_log = logging.getLogger(__name__)

_REST = {
    "label": "the rest goes to the true next token",
    "decoupled": "of the rest a student learns the sum alone, not its ids",
    "ghost": "of the rest a student learns the sum alone, not its ids",
    "uniform": "the rest is spread evenly over all ids",
}
"""What `objective.residual` makes of the mass that a target lacks, where it does not just leave it out."""

MOST_NAMED = 5


def ignored_caches(
    data: DataConfig, objective: ObjectiveConfig, train: TrainConfig
) -> Iterator[str]:
    """Say which caches of the recipe the job does not read, and why: a line for each key that names some."""
    caches = [source.cache for source in data.sources if source.cache is not None]
    if caches and (objective.target == "teacher" or objective.peak_kd_weight == 0):
        reason = "objective.kd_weight is 0"
        if objective.target == "teacher":
            reason = "objective.target is teacher"
        yield f"not read, since {reason}: {', '.join(caches)} (data.cache)"
    if data.held_out_cache is not None and train.eval_interval is None:
        yield f"not read, since train.eval_interval is not set: {data.held_out_cache} (data.held_out_cache)"


def check_kernels(objective: ObjectiveConfig, *, logit_cap: float | None) -> None:
    """Refuse, on every rank and before anything is built, kernels that are insisted on and that some rank cannot run.

    Every rank of the job calls it. What it compiles is what the student's loss will launch.

    Args:
        objective: the loss.
        logit_cap: of the student; capped logits have kernels of their own.

    Raises:
        ConfigError: see `choose_backend`.
    """
    if objective.kernel == "cuda":
        source = CAPPED if logit_cap else SOURCE
        choose_backend("cuda", local_device(), dist.group.WORLD, source=source)


def check_positions(objective: ObjectiveConfig, parallel: ParallelConfig) -> None:
    """Refuse a share of each sequence's positions where ranks hold parts of a sequence.

    Raises:
        ConfigError: see above.
    """
    if objective.positions == "student_entropy" and parallel.context > 1:
        raise ConfigError(
            "a share of a sequence's positions is chosen where all of the sequence is",
            where="objective.positions: student_entropy",
            found=f"parallel.context {parallel.context}",
            expected="parallel.context 1",
            remedy="set parallel.context=1, or objective.positions=all",
        )


def check_targets(sources: Sequence[TrainingSource], objective: ObjectiveConfig) -> None:
    """Run the canary on every cache, and say what its targets keep; rank 0 reads, every rank learns of an error.

    Raises:
        ConfigError: a token may have more entries than what computes the loss takes.
        CacheMismatch, TeacherError: see `check_canary`.
    """

    def check() -> None:
        for source in sources:
            if source.cache is not None:
                _check_entries(source.cache, objective, where=source.config.cache)
                _check_sampler(source.cache, objective, where=source.config.cache)
                _check_fit(source, source.cache, objective)

    on_first_rank(check)


def _check_entries(cache: CacheReader, objective: ObjectiveConfig, *, where: object) -> None:
    most = int(cache.plan.sampler["num_draws"])
    require_entries_fit(most, where=where)
    if objective.kernel == "cuda":
        # The label may become an entry of its own.
        most += objective.residual == "label"
        LossBackend(name="cuda", is_insisted=True).fitting(num_entries=most, num_columns=1)


def _check_sampler(cache: CacheReader, objective: ObjectiveConfig, *, where: object) -> None:
    if cache.plan.kind != "counts" or not objective.needs_truncated:
        return
    if objective.positions == "teacher_entropy":
        raise ConfigError(
            "the teacher's entropy is not known from samples: positions chosen by a sample's would learn from chosen "
            "samples, which are biased",
            where=f"objective.positions; {where}",
            found=f"teacher_entropy; capture.sampler {cache.plan.sampler['name']}",
            expected="a cache of topk or topp, or objective.target=teacher",
            remedy="set objective.positions=student_entropy, which does not look at the sample",
        )
    raise ConfigError(
        "the objective is for truncated targets, and these were sampled: which ids a sample keeps is chance, and "
        "no estimate made of them is unbiased",
        where=f"objective.divergence, objective.residual; {where}",
        found=f"{objective.divergence}, {objective.residual}; capture.sampler {cache.plan.sampler['name']}",
        expected="forward_kl and another residual, or a cache of topk or topp",
        remedy="set objective.divergence=forward_kl objective.residual=drop, which samples estimate without bias",
    )


def _check_fit(
    source: TrainingSource,
    cache: CacheReader,
    objective: ObjectiveConfig,
) -> None:
    kept = KeptShare()
    run_canary(
        source.sequences.plan.unmasked,
        cache,
        num_sequences=source.sequences.num_sequences,
        where=source.config.cache,
        captured_rate=cache.manifest.totals["canary_hit_rate"],
        captured_sequences=cache.plan.num_sequences,
        refuse=source.config.canary == "refuse",
        kept=kept,
    )
    if cache.plan.kind == "logprobs" and kept.positions:
        line = kept_mass_line(kept, f"{source.config.cache}", cache.plan.sampler["name"], objective)
        _log.log(logging.WARNING if kept.is_low else logging.INFO, line)


def kept_mass_line(kept: KeptShare, where: str, sampler: str, objective: ObjectiveConfig) -> str:
    """Say what cut-off targets keep of the teacher's distribution, and what a student learns of the rest."""
    rest = _REST.get(
        objective.residual,
        f"ids that are left out are trained to 0, and what is kept, scaled to 1, is {kept.bias:.2f} nats off "
        "the teacher's distribution",
    )
    line = (
        f"{where}: {sampler} keeps {kept.mean:.1%} of the teacher's mass (mean of {kept.positions:,} positions); "
        f"with objective.residual={objective.residual} {rest}"
    )
    if not kept.is_low:
        return line
    return (
        f"{line}; students learn that bias; remedy: capture with a larger num_draws, or sampled "
        "(capture.sampler=systematic), which has no bias"
    )


def check_teacher(
    teacher: LogitsEngine | None, sequences: SequenceData, objective: ObjectiveConfig
) -> None:
    """Refuse a teacher in the job that excludes ids where the divergence to it is then infinite.

    Rank 0 scores the first sequence, every rank learns of an error. KL(student || teacher) has log t of every id that
    the student gives any probability; the other divergences have only that of ids which the teacher gives some.

    Raises:
        TeacherError: some logits are -inf, and objective.divergence is reverse_kl without smoothing.
    """
    if teacher is None or objective.divergence != "reverse_kl":
        return
    if extremes(objective.smoothing)[0] > 0:
        return

    def check() -> None:
        tokens, _ = sequences.plan.read(np.zeros(1, np.int64))
        logits = teacher.logits(torch.from_numpy(tokens).long().to(teacher.device))
        excluded = logits.isneginf().flatten(0, -2).any(0).nonzero().flatten().tolist()
        if excluded:
            more = f" and {len(excluded) - MOST_NAMED} more" if len(excluded) > MOST_NAMED else ""
            raise TeacherError(
                "the teacher gives some ids no probability at all, which makes reverse_kl infinite",
                where="objective.divergence",
                found=f"logits of -inf for ids {', '.join(map(str, excluded[:MOST_NAMED]))}{more}",
                expected="finite logits of every id of the vocabulary",
                remedy="set objective.smoothing=0.001, which gives every id a share of it, or "
                "objective.divergence=jensen_shannon or forward_kl, which stay finite",
            )

    on_first_rank(check)
