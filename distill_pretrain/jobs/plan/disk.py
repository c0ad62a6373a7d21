"""Part of `plan`: what a student's checkpoints and exports take on the disk."""

from __future__ import annotations

from distill_pretrain.mcore.model.config import checkpoint_bytes_per_parameter
from distill_pretrain.planning.figures import Figure, Part
from distill_pretrain.planning.parameters import num_parameters
from distill_pretrain.planning.student_job import StudentJob
from distill_pretrain.train.config import TrainConfig


def disk_part(job: StudentJob, train: TrainConfig) -> Part:
    """Return the part on the bytes of a checkpoint and an export, and the most that the run keeps at a time."""
    parameters = num_parameters(
        job.model,
        vocab_size=job.vocab_size,
        seq_len=job.seq_len,
        tensor=job.parallel.tensor,
    )
    weight = 2 if train.precision == "bf16" else 4
    averaged = job.optimizer.ema_decay is not None
    checkpoint = parameters * checkpoint_bytes_per_parameter(train.precision, averaged=averaged)
    exports = 0
    if train.export_interval is not None:
        exports = -(-train.steps // train.export_interval)
        if train.keep_exports is not None:
            exports = min(exports, train.keep_exports + 1)
    checkpoints = train.keep_checkpoints + 1
    kept = "all (train.keep_exports: null)" if train.keep_exports is None else "keep_exports + 1"
    return Part(
        title="Disk of a student",
        figures=[
            Figure(
                name="checkpoint",
                value=checkpoint,
                unit="B",
                basis="estimate",
                how=f"parameters x ({weight} B weights + 8 B Adam{' + 4 B fp32 weights' if weight == 2 else ''}"
                f"{' + 4 B average' if averaged else ''})",
            ),
            Figure(
                name="export",
                value=parameters * weight if exports else 0,
                unit="B",
                basis="estimate",
                how=f"parameters x {weight} B (train.precision), every train.export_interval steps; 0 for none",
            ),
            Figure(
                name="disk of a run",
                value=checkpoint * checkpoints + parameters * weight * exports,
                unit="B",
                basis="estimate",
                how=f"{checkpoints} checkpoints (keep_checkpoints + the one being written), {exports} exports ({kept})",
            ),
        ],
    )
