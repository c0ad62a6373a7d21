"""Opening the model of the section `teacher`, for every verb that runs one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from distill_pretrain.contracts import LogitsEngine, TeacherEngine
    from distill_pretrain.data.sources import SequenceData
    from distill_pretrain.teacher.config import TeacherConfig

_log = logging.getLogger(__name__)


def load_teacher(
    teacher: TeacherConfig, sequences: SequenceData, tokens: Path, *, head_chunk_tokens: int = 1024
) -> LogitsEngine:
    """Load the section's model, whole, refused where it does not know the corpus's ids.

    Args:
        teacher: the section.
        sequences: what it will score.
        tokens: prefix of their .bin/.idx.
        head_chunk_tokens: positions whose logits exist at once, where they are asked for by chunks.

    Raises:
        TokenizerMismatch: another tokenizer or vocabulary than the corpus's.
        TeacherError, CheckpointError: the model cannot be loaded.
    """
    from distill_pretrain.teacher.engines import open_engine

    def open_one(member: TeacherConfig) -> LogitsEngine:
        return open_engine(
            member.kind,
            member.path,
            member.dtype,
            vocab_size=sequences.vocab_size,
            seq_len=sequences.plan.seq_len,
            tokenizer_digests=sequences.tokenizer_digests,
            trust=member.trust,
            head_chunk_tokens=head_chunk_tokens,
        )

    return apart(_opened(teacher, sequences, tokens, open_one), sequences)


def load_replica(teacher: TeacherConfig, sequences: SequenceData, tokens: Path) -> TeacherEngine:
    """Load this rank's share of a teacher for a capture or an evaluation.

    Several processes may hold one teacher together. It needs the groups of `teacher.engines.teacher_groups`.
    """
    from distill_pretrain.teacher.engines import open_teacher_engine

    def open_one(member: TeacherConfig) -> TeacherEngine:
        return open_teacher_engine(
            member,
            vocab_size=sequences.vocab_size,
            seq_len=sequences.plan.seq_len,
            tokenizer_digests=sequences.tokenizer_digests,
        )

    return apart(_opened(teacher, sequences, tokens, open_one), sequences)


Engine = TypeVar("Engine")


def _opened(
    teacher: TeacherConfig,
    sequences: SequenceData,
    tokens: Path,
    open_one: Callable[[TeacherConfig], Engine],
) -> Engine:
    """Open a teacher, or all those of a mixture as one; each must know the corpus's ids, and so each other's."""
    engines = []
    for member in teacher.members:
        require_own_tokenizer(member.path, tokens)
        require_plausible_width(member.path, sequences.vocab_size)
        engines.append(open_one(member))
        _name_padding(member, sequences)
    if len(engines) == 1:
        return engines[0]
    from distill_pretrain.teacher.engines.mixture import MixtureEngine

    weights = [member.weight for member in teacher.members]
    return cast(Engine, MixtureEngine(engines, weights))


def apart(engine: Engine, sequences: SequenceData) -> Engine:
    """Return the engine; one that is shown documents one by one where `data.documents` is separate."""
    from distill_pretrain.teacher.engines.apart import DocumentsApart

    end = sequences.plan.document_end
    return engine if end is None else cast(Engine, DocumentsApart(engine, end))


MOST_PADDING = 1024
"""Columns beyond the corpus's ids that padding may make up, and a tenth of those ids where that is more."""


_NOUNS = {"teacher.path": "teacher", "train.start_from": "source", "prune.source": "source"}


def _name_padding(teacher: TeacherConfig, sequences: SequenceData) -> None:
    width = model_width(teacher.path)
    if width > sequences.vocab_size:
        _log.info(
            f"the teacher's columns {sequences.vocab_size} to {width - 1} are padding: "
            "no ids of the corpus, left out of its softmax"
        )


def model_width(model: Path) -> int:
    """Return the number of ids that the config.json beside a model's weights names; 0 where there is none."""
    try:
        raw = json.loads((model / "config.json").read_bytes())
        width = (raw.get("text_config") or raw).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return 0
    return width if isinstance(width, int) else 0


def require_plausible_width(model: Path, vocab_size: int, *, key: str = "teacher.path") -> None:
    """Refuse a model with so many more ids than the corpus that they cannot be padding.

    Args:
        model: its folder.
        vocab_size: V of the corpus.
        key: of the recipe, that names the folder.

    Raises:
        TokenizerMismatch: see above.
    """
    from distill_pretrain.errors import TokenizerMismatch

    width = model_width(model)
    if width - vocab_size > max(MOST_PADDING, vocab_size // 10):
        raise TokenizerMismatch(
            f"the {_NOUNS[key]} has far more ids than the corpus: they mean something else",
            where=f"{key} {model}",
            found=f"{width:,} ids, {vocab_size:,} in the corpus",
            expected="as many, but for some columns of padding",
            remedy=f"tokenize with tokenizer.kind=hf and tokenizer.path set to the {_NOUNS[key]}'s folder; "
            "of a corpus made so, set data.vocab_size to its tokenizer's size",
        )


def require_own_tokenizer(model: Path, tokens: Path, *, key: str = "teacher.path") -> None:
    """Refuse a corpus made with another Hugging Face tokenizer than the one beside a model's weights.

    Args:
        model: its folder.
        tokens: prefix of the corpus.
        key: of the recipe, that names the folder.

    Raises:
        TokenizerMismatch: the two differ.
    """
    from distill_pretrain.corpus.recorded_tokenizer import is_same_tokenizer
    from distill_pretrain.corpus.tokenizers import HF_FILES
    from distill_pretrain.corpus.tokens_record import TokensRecord
    from distill_pretrain.errors import TokenizerMismatch

    record = TokensRecord.beside(tokens)
    has_tokenizer = any((model / name).is_file() for name in HF_FILES)
    if record is None or record.tokenizer["kind"] != "hf" or not has_tokenizer:
        return
    if not is_same_tokenizer(record, tokens.parent, model):
        raise TokenizerMismatch(
            f"the corpus was made with another tokenizer than the {_NOUNS[key]}'s",
            where=f"{key} {model}, data.tokens {tokens}",
            found=f"another model, normaliser, pre-tokenizer or end-of-document token beside the {_NOUNS[key]}",
            expected=f"tokenizer {record.tokenizer_digests[0][:12]}, recorded in tokens.json",
            remedy=f"tokenize with tokenizer.kind=hf and tokenizer.path set to the {_NOUNS[key]}'s folder",
        )
