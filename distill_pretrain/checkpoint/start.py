"""Weights that a new student starts from: of a Hugging Face folder, or of a checkpoint of this project.

A source is compared with the recipe when it is opened. A run records {"path": as the recipe has it, "sha256": of all
that decides the weights}, and does not open the source again when it goes on.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_pretrain.checkpoint.hf.config import CONFIG, HFModel, read_hf_model
from distill_pretrain.checkpoint.hf.family import shortest_pattern
from distill_pretrain.checkpoint.hf.files import WeightFiles, bullets
from distill_pretrain.checkpoint.hf.load import check_hf_weights, start_from_hf
from distill_pretrain.checkpoint.identity import TrainedModel, start_in_words, trained_model
from distill_pretrain.checkpoint.record import (
    RECORD,
    Checkpoint,
    hash_files,
    on_first_rank,
)
from distill_pretrain.checkpoint.store import CheckpointStore, find_checkpoint
from distill_pretrain.data.sources import SequenceData
from distill_pretrain.errors import CheckpointError, DistillPretrainError, TokenizerMismatch
from distill_pretrain.files.atomic import canonical_json
from distill_pretrain.mcore.init.deep import activation_of, residual_scaling
from distill_pretrain.mcore.model.config import ModelConfig

if TYPE_CHECKING:
    from distill_pretrain.mcore.student.base import Student

KEY = "train.start_from"
_FUNCTION = (
    "arch",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "rotary_base",
    "rotary_fraction",
    "rope_scaling_factor",
    "rope_linear_factor",
    "windowed_rotary_base",
    "yarn",
    "attention_scale_width",
    "embedding_scale",
    "zero_centred_norms",
    "attention_temperature",
    "attention_temperature_positions",
    "sliding_window",
    "qkv_bias",
    "qk_norm",
    "qk_norm_whole",
    "attention_output_bias",
    "attention_sinks",
    "mlp_bias",
    "norm_epsilon",
    "norm_placement",
    "tie_embeddings",
)
"""Keys of the section model that decide what function weights are; the residual scaling does, too."""


class StartingWeights(ABC):
    """An opened source whose architecture and vocabulary are the student's.

    Attributes:
        description: what it is, for the console.
    """

    description: str

    @abstractmethod
    def fingerprint(self) -> str:
        """Return the sha256 of all that decides the weights, every byte of which is read; every rank calls it.

        Raises:
            CheckpointError: files are not what was saved.
        """

    @abstractmethod
    def fill(self, student: Student) -> None:
        """Give a new student these weights, this rank's share of them; every rank calls it."""

    def facts(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return what else of its start a run with this identity records."""
        return {}


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """What a student has to share with its source."""

    model: ModelConfig
    vocab_size: int
    seq_len: int


@dataclass(frozen=True, kw_only=True)
class _FolderWeights(StartingWeights):
    """Weights that lie in a Hugging Face folder."""

    folder: Path
    files: WeightFiles
    family: str
    shape: _Shape
    description: str

    def fingerprint(self) -> str:
        names = sorted({CONFIG, *self.files.files.values()})
        return hashlib.sha256(canonical_json(hash_files(self.folder, names))).hexdigest()

    def fill(self, student: Student) -> None:
        shape = self.shape
        start_from_hf(
            student,
            self.files,
            model=shape.model,
            vocab_size=shape.vocab_size,
            max_positions=shape.seq_len,
            family=self.family,
        )


@dataclass(frozen=True, kw_only=True)
class _CheckpointWeights(StartingWeights):
    """Weights that lie in a checkpoint of this project."""

    checkpoint: Checkpoint
    description: str

    def fingerprint(self) -> str:
        self.checkpoint.verify()
        return self.checkpoint.sha256

    def fill(self, student: Student) -> None:
        from distill_pretrain.mcore.student.state import start_from_checkpoint

        start_from_checkpoint(student, self.checkpoint.folder)


def open_weights(
    folder: Path,
    *,
    model: ModelConfig,
    vocab_size: int,
    seq_len: int,
    tokenizer_digests: Sequence[str] = (),
) -> StartingWeights:
    """Find the weights at a path and compare them with the student; reads records and headers alone.

    Args:
        folder: a Hugging Face folder, or a run or checkpoint of this project.
        model: of the student.
        vocab_size: V of its corpus. A Hugging Face model may have more rows: padding, left out.
        seq_len: L; a gpt2 student takes the first L learned positions.
        tokenizer_digests: of the corpus; compared where a checkpoint knows its own.

    Raises:
        CheckpointError: there are no weights, they are damaged, or of another architecture; lists all that differs.
        TokenizerMismatch: another vocabulary or tokenizer.
    """
    shape = _Shape(model=model, vocab_size=vocab_size, seq_len=seq_len)
    if (folder / CONFIG).is_file():
        return _open_folder(folder, shape)
    if not folder.is_dir():
        raise _no_weights(folder, "no such folder")
    return _open_checkpoint(folder, shape, tokenizer_digests)


def _no_weights(folder: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "no weights to start from",
        where=f"{KEY} {folder}",
        found=found,
        expected=f"a Hugging Face folder with {CONFIG} and *.safetensors, a run folder with checkpoints/step-*, "
        f"or a checkpoint with {RECORD}",
        remedy="correct the path",
    )


def _open_folder(folder: Path, shape: _Shape) -> StartingWeights:
    found = read_hf_model(folder)
    _require_architecture(folder, found.model, shape.model)
    _require_rows(folder, found.vocab_size, shape.vocab_size)
    _require_positions(folder, found.max_positions, shape, exactly=False)
    return _FolderWeights(
        folder=folder,
        files=check_hf_weights(folder),
        family=found.family,
        shape=shape,
        description=_described(found),
    )


def _described(found: HFModel) -> str:
    return f"a Hugging Face model ({found.family}, {found.dtype})"


def _open_checkpoint(folder: Path, shape: _Shape, digests: Sequence[str]) -> StartingWeights:
    try:
        checkpoint = find_checkpoint(folder)
    except CheckpointError as error:
        if (folder / RECORD).exists():
            raise
        raise _no_weights(folder, error.what) from None
    trained = trained_model(checkpoint.identity, checkpoint.folder)
    _require_architecture(folder, trained.model, shape.model)
    _require_same_tokens(folder, trained, shape.vocab_size, digests)
    _require_positions(folder, trained.seq_len, shape, exactly=True)
    return _CheckpointWeights(checkpoint=checkpoint, description=f"step {checkpoint.step} of a run")


def _require_architecture(folder: Path, found: ModelConfig, wanted: ModelConfig) -> None:
    """Raise CheckpointError that names every key in which the function differs."""
    source, recipe = _function(found), _function(wanted)
    problems = [
        f"model.{key}: {source[key]} in the source, {recipe[key]} in the recipe"
        for key in source
        if not _are_equal(source[key], recipe[key])
    ]
    scaling = residual_scaling(wanted)
    if not problems and residual_scaling(found) != scaling:
        problems = [
            f"model.init: {found.init} in the source, {wanted.init} in the recipe: residual branches are scaled "
            "differently"
        ]
    if problems:
        raise CheckpointError(
            "the weights are of another architecture than the student:\n" + bullets(problems),
            where=f"{KEY} {folder}",
            remedy="set the section model to the source's values, or start from another source",
        )


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two values of a key are the same; files hold 1e-5 as its neighbour in float32, too."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _function(model: ModelConfig) -> dict[str, Any]:
    heads = model.num_attention_heads
    return {
        **model.model_dump(include=set(_FUNCTION)),
        "num_query_groups": model.num_query_groups or heads,
        "kv_channels": model.kv_channels or model.hidden_size // heads,
        "activation": activation_of(model)[1],
        # Coefficients of the routers' losses are a matter of training.
        "experts": model.experts and model.experts.model_dump(exclude={"load_balancing", "z_loss"}),
        "attention_layers": shortest_pattern(
            [model.attention_of(layer) for layer in range(model.num_layers)]
        ),
    }


def _require_rows(folder: Path, rows: int, vocab_size: int) -> None:
    if rows < vocab_size:
        raise TokenizerMismatch(
            "the source's vocabulary is smaller than the corpus's",
            where=f"{KEY} {folder}",
            found=f"{rows:,} ids",
            expected=f"at least {vocab_size:,} ids",
            remedy="tokenise the corpus with the source's own tokenizer (tokenizer.kind=hf)",
        )


def _require_positions(folder: Path, positions: int, shape: _Shape, *, exactly: bool) -> None:
    """Refuse learned positions that are not there; `exactly` where they cannot be cut."""
    fits = positions == shape.seq_len if exactly else positions >= shape.seq_len
    if shape.model.arch == "gpt2" and not fits:
        raise CheckpointError(
            "the source has another number of learned positions",
            where=f"{KEY} {folder}",
            found=positions,
            expected=f"{'' if exactly else 'at least '}data.seq_len = {shape.seq_len}",
        )


def _require_same_tokens(
    folder: Path, trained: TrainedModel, vocab_size: int, digests: Sequence[str]
) -> None:
    if trained.vocab_size != vocab_size:
        raise TokenizerMismatch(
            "the source's vocabulary is not the corpus's",
            where=f"{KEY} {folder}",
            found=f"{trained.vocab_size:,} ids",
            expected=f"{vocab_size:,} ids",
            remedy="tokenise the corpus with the source's tokenizer",
        )
    known = trained.tokenizer_sha256
    if known and digests and known not in digests:
        raise TokenizerMismatch(
            "the source was trained with another tokenizer",
            where=f"{KEY} {folder}",
            found=f"tokenizer {known[:12]}",
            expected=f"tokenizer {digests[0][:12]}",
            remedy="tokenise the corpus with the source's tokenizer",
        )


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a recipe says that a student starts.

    Attributes:
        folder: of the weights.
        open: compares them with a student of that corpus; see `open_weights` and `phase.open_phase`.
        optimizer: of the start of a phase, whether its state is "kept" or "fresh"; None where a run starts anew.
    """

    folder: Path
    open: Callable[[SequenceData], StartingWeights]
    optimizer: str | None = None

    def look(
        self, store: CheckpointStore, sequences: SequenceData, identity: Mapping[str, Any]
    ) -> tuple[dict[str, Any], StartingWeights | None]:
        """Return what the run records of its start, and the weights unless it has started already; every rank calls it.

        Args:
            store: the run's checkpoints. Where they name the same folder it is not opened; what is there by now
                decides nothing. Another folder is: it may be the same weights in another place.
            sequences: the first corpus.
            identity: of the run, but for its start.

        Raises:
            CheckpointError, TokenizerMismatch: see `open_weights`.
        """
        recorded = on_first_rank(lambda: _recorded(store))
        wanted = (f"{self.folder}", self.optimizer)
        if recorded is not None and (recorded["path"], recorded.get("optimizer")) == wanted:
            return recorded, None
        try:
            weights = on_first_rank(lambda: self.open(sequences))
        except DistillPretrainError as error:
            if recorded is None:
                raise
            raise CheckpointError(
                "the run started from other weights",
                where=f"{store.root}, {KEY}",
                found=f"{self.folder} ({error.what})",
                expected=start_in_words(recorded),
                remedy="restore the recipe, or set another train.output_dir",
            ) from error
        record = {"path": f"{self.folder}", "sha256": weights.fingerprint()}
        return {**record, **weights.facts(identity)}, weights


def _recorded(store: CheckpointStore) -> dict[str, Any] | None:
    """The start that the newest readable checkpoint records."""
    for folder in reversed(store.complete()):
        try:
            record = Checkpoint.open(folder).identity.get("start_from")
        except CheckpointError:
            continue
        return record if isinstance(record, dict) and {"path", "sha256"} <= record.keys() else None
    return None
