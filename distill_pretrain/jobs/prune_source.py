"""What `prune.source` names, opened and compared with the corpus and the targets before weights are read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_pretrain.errors import ConfigError, TokenizerMismatch
from distill_pretrain.jobs.export import tokenizer_of_run
from distill_pretrain.teacher.loading import require_own_tokenizer, require_plausible_width

if TYPE_CHECKING:
    from distill_pretrain.checkpoint.identity import TrainedModel
    from distill_pretrain.checkpoint.record import Checkpoint
    from distill_pretrain.data.config import DataConfig
    from distill_pretrain.data.sources import SequenceData
    from distill_pretrain.mcore.model.config import ModelConfig
    from distill_pretrain.pruning.config import PruneConfig, TargetConfig
    from distill_pretrain.pruning.folder import Source

KEY = "prune.source"


@contextmanager
def open_source(
    config: PruneConfig,
    data: DataConfig,
    sequences: SequenceData,
    targets: dict[str, TargetConfig],
) -> Iterator[tuple[Source, dict[str, Any]]]:
    """Open the source as a folder, a checkpoint by exporting it for as long as the block lasts.

    Args:
        config: the section prune.
        data: the section data.
        sequences: its corpus.
        targets: all of them, by name.

    Yields:
        The source, and what the records say of where it came from.

    Raises:
        CheckpointError: damaged, or of a family that cannot be pruned.
        TokenizerMismatch: another vocabulary or tokenizer than the corpus's.
        ConfigError: sequences longer than it was made for, or targets that no pruning reaches.
    """
    from distill_pretrain.checkpoint.hf.config import CONFIG
    from distill_pretrain.checkpoint.hf.registry import family_of
    from distill_pretrain.checkpoint.identity import trained_model
    from distill_pretrain.checkpoint.store import find_checkpoint
    from distill_pretrain.pruning.folder import Source, unsupported

    place = config.source
    if (place / CONFIG).is_file() or not place.is_dir():
        source = Source.open(place)
        require_own_tokenizer(place, data.tokens, key=KEY)
        require_plausible_width(place, sequences.vocab_size, key=KEY)
        _require_positions(place, source.config["max_position_embeddings"], data)
        _require_fitting(place, source.model, source.vocab_size, sequences, targets)
        yield source, {"path": f"{place}", "sha256": source.sha256()}
        return
    checkpoint = find_checkpoint(place)
    trained = trained_model(checkpoint.identity, checkpoint.folder)
    family = family_of(trained.model)
    if family.unpruned is not None:
        raise unsupported(place, family)
    _require_same_tokens(place, trained, sequences)
    _require_positions(place, trained.seq_len, data)
    _require_fitting(place, trained.model, trained.vocab_size, sequences, targets)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".source-", dir=config.output_dir) as temporary:
        folder = Path(temporary) / "exported"
        _export(checkpoint, folder, trained.precision)
        origin = {"path": f"{place}", "step": checkpoint.step, "sha256": checkpoint.sha256}
        yield Source.open(folder), origin


def _export(checkpoint: Checkpoint, folder: Path, dtype: str) -> None:
    from distill_pretrain.checkpoint.hf.export import export_checkpoint

    tokenizer, eod_id, bos_id = tokenizer_of_run(checkpoint, required=False)
    export_checkpoint(
        checkpoint, folder, dtype=dtype, tokenizer=tokenizer, eod_id=eod_id, bos_id=bos_id
    )


def _require_same_tokens(place: Path, trained: TrainedModel, sequences: SequenceData) -> None:
    known, digests = trained.tokenizer_sha256, sequences.tokenizer_digests
    if trained.vocab_size != sequences.vocab_size or (known and digests and known not in digests):
        raise TokenizerMismatch(
            "the source was trained on another vocabulary than the corpus's",
            where=f"{KEY} {place}",
            found=f"{trained.vocab_size:,} ids, tokenizer {(known or 'unknown')[:12]}",
            expected=f"{sequences.vocab_size:,} ids, tokenizer {digests[0][:12] if digests else 'unknown'}",
            remedy="set data.tokens to a corpus of the source's tokenizer",
        )


def _require_positions(place: Path, longest: int, data: DataConfig) -> None:
    if data.seq_len > longest:
        raise ConfigError(
            "the sequences are longer than the source was made for",
            where=f"data.seq_len, {KEY} {place}",
            found=data.seq_len,
            expected=f"at most {longest}",
            remedy="lower data.seq_len",
        )


def _require_fitting(
    place: Path,
    model: ModelConfig,
    vocab_size: int,
    sequences: SequenceData,
    targets: dict[str, TargetConfig],
) -> None:
    """Refuse a source that does not know the corpus's ids, and targets that it cannot be pruned to."""
    from distill_pretrain.pruning.search import require_findable
    from distill_pretrain.pruning.shapes import require_reachable

    if vocab_size < sequences.vocab_size:
        raise TokenizerMismatch(
            "the source's vocabulary is smaller than the corpus's",
            where=f"{KEY} {place}",
            found=f"{vocab_size:,} ids",
            expected=f"at least {sequences.vocab_size:,} ids",
            remedy="tokenise the corpus with the source's own tokenizer (tokenizer.kind=hf)",
        )
    require_reachable(targets, model, vocab_size=vocab_size, where=place)
    require_findable(targets, model, vocab_size=vocab_size)
