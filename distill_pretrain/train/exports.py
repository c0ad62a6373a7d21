"""Exports during training: output_dir/hf/step-N, folders that stock transformers loads.

Of a student whose weights are averaged, output_dir/hf-ema/step-N, too.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from distill_pretrain.checkpoint.hf import hf_config
from distill_pretrain.checkpoint.hf.save import RECORD
from distill_pretrain.checkpoint.identity import trained_model
from distill_pretrain.corpus.tokens_record import TokensRecord
from distill_pretrain.errors import ConfigError
from distill_pretrain.mcore.student.base import Student
from distill_pretrain.processes.process import on_first_rank
from distill_pretrain.train.callbacks import Callback
from distill_pretrain.train.config import TrainConfig

_STEP_FOLDER = re.compile(r"step-\d{8,}")


class RunExports:
    """Exports a run's student every `train.export_interval` steps and after the last.

    Args:
        train: where, how often, in which precision.
        identity: of the run.
        tokens: prefix of the first corpus; its tokenizer goes into the exports.
        zero_stage: of DeepSpeed; stage 3 leaves no rank with whole weights to export.

    Raises:
        ConfigError: exports are wanted under ZeRO-3.
        CheckpointError: no class of transformers computes the model.
    """

    def __init__(
        self, train: TrainConfig, identity: dict[str, Any], tokens: Path, *, zero_stage: int | None
    ) -> None:
        self._train = train
        self._identity = identity
        record = TokensRecord.beside(tokens)
        self._tokenizer = None if record is None else tokens.parent / record.tokenizer["file"]
        self._eod_id = None if record is None else record.eod_id
        self._bos_id = None if record is None else record.bos_id
        if train.export_interval is not None and zero_stage == 3:
            raise ConfigError(
                "weights that ZeRO-3 has scattered are not exported during training",
                where="train.export_interval",
                remedy="leave it out, and use `distill-pretrain export` on the checkpoints",
            )
        if train.export_interval is not None:
            trained = trained_model(identity, train.output_dir)
            hf_config(
                trained.model,
                vocab_size=trained.vocab_size,
                max_positions=trained.seq_len,
                dtype=train.precision,
            )

    def of(self, student: Student) -> Callback:
        """Make the callback that exports a student whenever its turn has come."""
        return _Exporting(self, student)

    def is_due(self, step: int) -> bool:
        """Tell whether a step's turn has come."""
        interval = self._train.export_interval
        return interval is not None and (step % interval == 0 or step == self._train.steps)

    def write(self, step: int, chunks: Sequence[torch.nn.Module], *, weights: str = "last") -> None:
        """Export what the chunks hold: "last" or "ema" weights. Every rank calls it."""
        folder = self._train.output_dir / ("hf" if weights == "last" else f"hf-{weights}")
        from distill_pretrain.checkpoint.hf.export import export_model

        export_model(
            chunks,
            self._identity,
            step,
            folder / f"step-{step:08d}",
            dtype=self._train.precision,
            tokenizer=self._tokenizer,
            eod_id=self._eod_id,
            bos_id=self._bos_id,
            replaces_step=True,
            weights=weights,
        )
        on_first_rank(lambda: self._prune(folder))

    def _prune(self, folder: Path) -> None:
        """Drop all exports but the newest `train.keep_exports`."""
        keep = self._train.keep_exports
        found = sorted(folder.glob("step-*")) if keep is not None else []
        exports = [p for p in found if _STEP_FOLDER.fullmatch(p.name) and (p / RECORD).is_file()]
        for old in exports[: -(keep or 0)]:
            shutil.rmtree(old, ignore_errors=True)


class _Exporting(Callback):
    """See `RunExports.of`."""

    def __init__(self, exports: RunExports, student: Student) -> None:
        self._exports, self._student = exports, student

    def after_step(self, step: int, doing: Callable[[str], None]) -> dict[str, Any]:
        """See `Callback`."""
        if self._exports.is_due(step):
            doing(f"step {step}: exporting")
            self._student.gather_weights()
            self._exports.write(step, self._student.chunks)
            if self._student.average is not None:
                with self._student.average.in_place():
                    self._exports.write(step, self._student.chunks, weights="ema")
        return {}
