"""Tokens that an earlier run of `tokenize` left: are they what the same job would make now?"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from distill_pretrain.config import load_recipe
from distill_pretrain.corpus.config import TokenizerConfig, TokenizeRecipe
from distill_pretrain.corpus.recorded_tokenizer import is_same_tokenizer, load_recorded_tokenizer
from distill_pretrain.corpus.sources import SourceList
from distill_pretrain.corpus.special_tokens import shown
from distill_pretrain.corpus.token_index import TokenIndex
from distill_pretrain.corpus.tokenizers import load_tokenizer
from distill_pretrain.corpus.tokens_record import FILE_NAME as RECORD
from distill_pretrain.corpus.tokens_record import TokensRecord
from distill_pretrain.errors import CorpusError, TokenizerMismatch

_log = logging.getLogger(__name__)

RECIPE, SOURCES = "recipe.yaml", "sources.json"


def check_done(recipe: TokenizeRecipe, sources: SourceList) -> TokensRecord:
    """Checks that the output folder is what this recipe would make.

    Raises:
        CorpusError: it was made from other text, or another recipe, or is damaged.
        TokenizerMismatch: it was made with another tokenizer.
    """
    folder = recipe.corpus.output_dir
    record = TokensRecord.load(folder)
    recorded = load_recipe(TokenizeRecipe, folder / RECIPE)
    different = _differences(recorded, recipe)
    if different:
        raise _stale(folder, f"another value of {', '.join(different)}")
    _check_sources(folder, sources)
    config = recipe.tokenizer
    if config.path is not None and (
        config.kind != record.tokenizer["kind"]
        or not is_same_tokenizer(record, folder, config.path)
    ):
        raise TokenizerMismatch(
            "the folder was made with another tokenizer than tokenizer.path is now",
            where=folder,
            remedy="set corpus.output_dir to another folder",
        )
    _check_special_tokens(folder, record, config)
    for name, fingerprint in record.corpora.items():
        index = TokenIndex.open(folder / name, vocab_size=record.vocab_size)
        index.check_loss()
        if index.record != fingerprint:
            raise CorpusError(
                "the tokens are not what was written",
                where=folder / name,
                expected="the fingerprint in tokens.json",
                remedy="remove the folder and tokenize again",
            )
    return record


def _check_special_tokens(folder: Path, record: TokensRecord, config: TokenizerConfig) -> None:
    """Checks that documents begin and end as they would now.

    A folder that an earlier version made has no BOS tokens whatever its tokenizer does, and stays valid.
    """
    made_by = load_recorded_tokenizer(folder, record)
    asked = load_tokenizer(
        made_by.kind,
        folder / record.tokenizer["file"],
        bos=config.bos,
        end_of_document=config.end_of_document,
    )
    if asked.eod_id != made_by.eod_id:
        raise _stale(folder, "another value of tokenizer.end_of_document")
    if asked.bos_id != made_by.bos_id:
        if config.bos != "auto":
            raise _stale(folder, "another value of tokenizer.bos")
        _log.warning(
            f"the tokenizer begins texts with {shown(asked, asked.bos_id)}, which these documents lack"
            if asked.bos_id is not None
            else "the tokenizer by itself begins no text with that token"
        )


def _check_sources(folder: Path, sources: SourceList) -> None:
    """Checks that the tokens were made from these files as they are now."""
    stored = json.loads((folder / SOURCES).read_text())
    if stored["fingerprint"] != sources.fingerprint():
        raise _stale(
            folder, "other source files: some came, went, changed size, or hold JSON lines"
        )
    written_ns = (folder / RECORD).stat().st_mtime_ns
    later = [file.where for file in sources.files if file.modified_ns > written_ns]
    if "stamp" not in stored:
        if later:
            _log.warning(
                f"{later[0]} was written after the tokens (of {len(later):,} such files); an earlier version "
                "made them and noted sizes alone, which are the same"
            )
        return
    # A copy of the corpus has other times and the same contents.
    if stored["stamp"] != sources.stamp() and stored["content_sha256"] != sources.content_sha256():
        changed = f", such as {later[0]}" if later else ""
        raise _stale(folder, f"other contents: files have changed{changed}")


def _differences(recorded: TokenizeRecipe, recipe: TokenizeRecipe) -> list[str]:
    """Keys whose values lead to other tokens."""
    old, new = recorded.model_dump(mode="json"), recipe.model_dump(mode="json")
    # Where the output is and how many processes write it changes none of its bytes, and of paths and patterns what
    # counts is the files found with them.
    ignored = {
        "corpus": {"output_dir", "workers", "paths", "include"},
        # What these come to is compared, see `_check_special_tokens`.
        "tokenizer": {"path", "bos", "end_of_document"},
    }
    if recipe.tokenizer.path is not None and recorded.tokenizer.path is not None:
        ignored["tokenizer"] |= {"vocab_size", "model_type", "training_bytes"}
    else:
        ignored["tokenizer"].discard("path")
    return [
        f"{section}.{key}"
        for section in ("corpus", "tokenizer")
        for key in new[section]
        if key not in ignored[section] and old[section][key] != new[section][key]
    ]


def _stale(folder: Path, found: str) -> CorpusError:
    return CorpusError(
        "the output folder holds the tokens of another recipe",
        where=folder,
        found=f"made from {found}",
        remedy="set corpus.output_dir to another folder; nothing was overwritten",
    )
