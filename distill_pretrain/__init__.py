"""Pretraining language models by offline distillation at cluster scale.

The names below are the public API; docs/api.md has one runnable snippet for each. They are imported when they are first
used, so that `import distill_pretrain` loads neither torch nor megatron-core and changes nothing in the process.
"""

from __future__ import annotations

from importlib import import_module
from logging import NullHandler, getLogger
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Who uses the package decides where its notices go; the command line does in processes/logs.py.
getLogger(__name__).addHandler(NullHandler())

if TYPE_CHECKING:
    from distill_pretrain.api.dataset import DistillationDataset, collate_distillation
    from distill_pretrain.api.jobs import (
        capture_cache,
        evaluate_models,
        export_model,
        prune_model,
        train_student,
    )
    from distill_pretrain.api.losses import linear_sparse_kd_loss, sparse_kd_loss
    from distill_pretrain.api.targets import pad_targets, sample_targets
    from distill_pretrain.api.writing import write_cache
    from distill_pretrain.cache.reader import CacheReader
    from distill_pretrain.contracts import RaggedTargets, SparseTargets
    from distill_pretrain.corpus.sequence_plan import SequencePlan
    from distill_pretrain.corpus.token_index import TokenIndex
    from distill_pretrain.corpus.token_writer import TokenIndexWriter
    from distill_pretrain.errors import DistillPretrainError
    from distill_pretrain.train.callbacks import Callback

_MODULES = {
    "Callback": "train.callbacks",
    "CacheReader": "cache.reader",
    "DistillPretrainError": "errors",
    "DistillationDataset": "api.dataset",
    "RaggedTargets": "contracts",
    "SequencePlan": "corpus.sequence_plan",
    "SparseTargets": "contracts",
    "TokenIndex": "corpus.token_index",
    "TokenIndexWriter": "corpus.token_writer",
    "capture_cache": "api.jobs",
    "collate_distillation": "api.dataset",
    "evaluate_models": "api.jobs",
    "export_model": "api.jobs",
    "linear_sparse_kd_loss": "api.losses",
    "pad_targets": "api.targets",
    "prune_model": "api.jobs",
    "sample_targets": "api.targets",
    "sparse_kd_loss": "api.losses",
    "train_student": "api.jobs",
    "write_cache": "api.writing",
}
"""Public name -> the module of this package that has it."""

__all__ = [
    "CacheReader",
    "Callback",
    "DistillPretrainError",
    "DistillationDataset",
    "RaggedTargets",
    "SequencePlan",
    "SparseTargets",
    "TokenIndex",
    "TokenIndexWriter",
    "__version__",
    "capture_cache",
    "collate_distillation",
    "evaluate_models",
    "export_model",
    "linear_sparse_kd_loss",
    "pad_targets",
    "prune_model",
    "sample_targets",
    "sparse_kd_loss",
    "train_student",
    "write_cache",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What `dir` lists: the public names too, imported or not."""
    return sorted({*globals(), *__all__})
