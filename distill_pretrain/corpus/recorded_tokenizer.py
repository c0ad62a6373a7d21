"""The tokenizer that made a folder of tokens, as tokens.json records it: found again, and told from others."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from distill_pretrain.corpus.tokenizers import Tokenizer, load_tokenizer, sha256_of_hf_folder
from distill_pretrain.corpus.tokens_record import TokensRecord
from distill_pretrain.errors import TokenizerMismatch

if TYPE_CHECKING:
    from distill_pretrain.corpus.config import BosMode


def tokenizer_sha256(kind: str, path: Path) -> str:
    """Compute the fingerprint of the tokenizer at a path, as tokens.json records it."""
    if kind == "hf":
        return sha256_of_hf_folder(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_same_tokenizer(record: TokensRecord, folder: Path, path: Path) -> bool:
    """Tell whether the tokenizer at a path gives the ids of the one that made a folder of tokens.

    Files that are equal byte for byte are not loaded.

    Args:
        record: tokens.json of the folder.
        folder: with the tokenizer that made the tokens, for a record that only knows the bytes of its files.
        path: of the tokenizer in question, of the same kind.

    Raises:
        ConfigError: it cannot be loaded.
    """
    made_by = record.tokenizer
    if tokenizer_sha256(made_by["kind"], path) == made_by["sha256"]:
        return True
    found = load_tokenizer(made_by["kind"], path, end_of_document=record.eod_id).semantic_sha256
    known = made_by.get("semantic_sha256")
    if found is None or known is not None:
        return found is not None and found == known
    return load_recorded_tokenizer(folder, record).semantic_sha256 == found


def load_recorded_tokenizer(folder: Path, record: TokensRecord) -> Tokenizer:
    """Load the tokenizer stored in a tokens folder, which `record` describes.

    Raises:
        TokenizerMismatch: it is not the one that made the tokens.
    """
    made_by = record.tokenizer
    path, sha256 = folder / made_by["file"], made_by["sha256"]
    bos: BosMode = "never" if record.bos_id is None else "always"
    tokenizer = load_tokenizer(made_by["kind"], path, bos=bos, end_of_document=record.eod_id)
    if tokenizer.sha256 != sha256:
        raise TokenizerMismatch(
            "the tokenizer beside the tokens is not the one that made them",
            where=path,
            found=f"sha256 {tokenizer.sha256[:12]}",
            expected=f"sha256 {sha256[:12]}, recorded in tokens.json",
            remedy="restore the file, or tokenize again into another corpus.output_dir",
        )
    return tokenizer
