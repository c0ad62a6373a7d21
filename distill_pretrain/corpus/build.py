"""The tokenize job: a corpus and a tokenizer in, one folder of token files out.

The folder is built as `<output_dir>.part` and renamed when complete, so a killed run leaves nothing under the
final name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distill_pretrain import __version__
from distill_pretrain.config import dump_recipe
from distill_pretrain.corpus.config import CorpusConfig, TokenizerConfig, TokenizeRecipe
from distill_pretrain.corpus.earlier import RECIPE, SOURCES, check_done
from distill_pretrain.corpus.encode import Keys, encode_batches
from distill_pretrain.corpus.loss_marks import MarkKeys
from distill_pretrain.corpus.readers import batches_of
from distill_pretrain.corpus.recorded_tokenizer import load_recorded_tokenizer
from distill_pretrain.corpus.sources import SourceList, list_sources
from distill_pretrain.corpus.special_tokens import ends_of_documents, first_tokens
from distill_pretrain.corpus.token_index import TokenIndex
from distill_pretrain.corpus.token_writer import TokenIndexWriter
from distill_pretrain.corpus.tokenizers import Tokenizer, load_tokenizer
from distill_pretrain.corpus.tokens_record import FILE_NAME as RECORD
from distill_pretrain.corpus.tokens_record import TokensRecord
from distill_pretrain.corpus.training import train_tokenizer
from distill_pretrain.errors import ConfigError, CorpusError
from distill_pretrain.files.atomic import fsync_path
from distill_pretrain.files.disk import naming
from distill_pretrain.files.ownership import owner_beside, owning

_log = logging.getLogger(__name__)

TRAIN, HELD_OUT = "train", "held_out"
OnProgress = Callable[[int, int, int], None]


@dataclass(frozen=True, kw_only=True)
class TokenizeResult:
    """What a tokenize job made.

    Attributes:
        output_dir: the folder.
        already_done: nothing was written: an earlier run had made the same.
        num_documents: documents of "train" and "held_out".
        num_tokens: tokens of the same, end-of-document tokens included.
        sources: the files that were read, and how many were left out.
    """

    output_dir: Path
    already_done: bool
    num_documents: dict[str, int]
    num_tokens: dict[str, int]
    sources: SourceList


def tokenize_corpus(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    *,
    on_progress: OnProgress = lambda done, total, documents: None,
) -> TokenizeResult:
    """Writes the tokens of a corpus, or finds that an earlier run has.

    Args:
        corpus: files, split and output folder.
        tokenizer: which tokenizer, or how to train one.
        on_progress: receives bytes done, bytes in all (as they are stored) and documents done.

    Raises:
        CorpusError: the text cannot be read, a split came out empty, or the output folder holds something else.
        ConfigError: the tokenizer cannot be loaded or trained.
    """
    sources = list_sources(corpus)
    recipe = TokenizeRecipe(corpus=corpus, tokenizer=tokenizer)
    output_dir = corpus.output_dir
    if not (output_dir / RECORD).exists():
        remedy = "wait for it, or set corpus.output_dir to another folder"
        with owning(owner_beside(output_dir), what=output_dir, remedy=remedy):
            # The owner before may have finished since.
            if not (output_dir / RECORD).exists():
                record = _tokenize(recipe, sources, on_progress)
                return _result(record, output_dir, sources, already_done=False)
    return _result(check_done(recipe, sources), output_dir, sources, already_done=True)


def _tokenize(
    recipe: TokenizeRecipe,
    sources: SourceList,
    on_progress: OnProgress,
) -> TokensRecord:
    """Writes the output folder, which this process owns."""
    output_dir = recipe.corpus.output_dir
    with _building(output_dir) as folder, naming(output_dir):
        tokens = _tokenizer(recipe, sources)
        tokenizer_file = tokens.save(folder)
        _log.info(ends_of_documents(tokens))
        _log.info(
            f"writing the tokens of {len(sources.files):,} files, {sources.num_bytes:,} bytes"
        )
        corpora = _write_splits(
            recipe, tokens, folder / tokenizer_file, folder, sources, on_progress
        )
        dump_recipe(recipe, folder / RECIPE)
        (folder / SOURCES).write_text(json.dumps(_describe(sources), indent=2) + "\n")
        semantic = tokens.semantic_sha256
        record = TokensRecord(
            tokenizer={
                "kind": tokens.kind,
                "sha256": tokens.sha256,
                **({"semantic_sha256": semantic} if semantic else {}),
                **({} if tokens.bos_id is None else {"bos_id": tokens.bos_id}),
                "vocab_size": tokens.vocab_size,
                "file": tokenizer_file,
            },
            vocab_size=tokens.vocab_size,
            eod_id=tokens.eod_id,
            corpora=corpora,
            software=_software(tokens.kind),
        )
        record.save(folder)
        _log.info(f"{TRAIN} begins with {first_tokens(TokenIndex.open(folder / TRAIN), tokens)}")
    return record


def load_tokenizer_of(tokens_dir: Path) -> Tokenizer:
    """Loads the tokenizer that made the tokens in a folder.

    Raises:
        TokenizerMismatch: the file beside them is another one.
        TokenDataError: the folder has no tokens.json.
    """
    return load_recorded_tokenizer(tokens_dir, TokensRecord.load(tokens_dir))


def is_held_out(document: int, *, seed: int, fraction: float) -> bool:
    """Tell whether a document, by its number in the corpus, is kept out of training."""
    digest = hashlib.blake2b(f"{seed}:{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < int(fraction * 2**64)


def _tokenizer(recipe: TokenizeRecipe, sources: SourceList) -> Tokenizer:
    config = recipe.tokenizer
    if config.path is not None:
        return load_tokenizer(
            config.kind, config.path, bos=config.bos, end_of_document=config.end_of_document
        )
    if config.kind != "sentencepiece":
        raise ConfigError(
            "only sentencepiece tokenizers are trained here",
            where="tokenizer.path",
            found="null",
            expected=f"the folder of a tokenizer for tokenizer.kind={config.kind}",
        )
    sample = min(config.training_bytes, sources.num_bytes)
    _log.info(f"training a tokenizer of {config.vocab_size:,} tokens on {sample:,} bytes")
    return train_tokenizer(recipe.corpus, config, sources)


def _write_splits(
    recipe: TokenizeRecipe,
    tokenizer: Tokenizer,
    tokenizer_path: Path,
    folder: Path,
    sources: SourceList,
    on_progress: OnProgress,
) -> dict[str, dict[str, Any]]:
    """Writes train.* and held_out.*; returns the fingerprint of each."""
    corpus = recipe.corpus
    names = [TRAIN, HELD_OUT] if corpus.held_out_fraction > 0 else [TRAIN]
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(TokenIndexWriter(folder / name, tokenizer.vocab_size))
            for name in names
        }
        encoded = encode_batches(
            batches_of(sources, corpus.text_key, mark_keys=corpus.mark_keys),
            load=partial(
                load_tokenizer,
                tokenizer.kind,
                tokenizer_path,
                bos="never" if tokenizer.bos_id is None else "always",
                end_of_document=tokenizer.eod_id,
            ),
            keys=Keys(corpus.text_key, corpus.mark_keys),
            workers=corpus.workers,
        )
        stack.enter_context(closing(encoded))
        number = num_bytes = 0
        marked = [0, 0]
        for batch in encoded:
            for document in batch.documents:
                held_out = is_held_out(number, seed=corpus.seed, fraction=corpus.held_out_fraction)
                writers[HELD_OUT if held_out else TRAIN].add_document(
                    document.ids, masked=document.masked, weight=document.weight
                )
                number += 1
            marked = [a + b for a, b in zip(marked, batch.marked, strict=True)]
            num_bytes += batch.num_bytes
            on_progress(num_bytes, sources.num_bytes, number)
        _check_not_empty(writers, corpus, number)
        _check_marked(writers, corpus, marked)
    return {name: TokenIndex.open(folder / name).record for name in names}


def _check_marked(
    writers: dict[str, TokenIndexWriter], corpus: CorpusConfig, marked: list[int]
) -> None:
    """Refuse keys that no document has, and a split that the loss leaves out whole; say how much it leaves out."""
    for name, key, found in zip(MarkKeys._fields, corpus.mark_keys, marked, strict=True):
        if key is not None and not found:
            raise CorpusError(
                f"no document has the key {key!r}",
                where=f"corpus.{name}_key",
                found="none in the JSON lines of the corpus",
                remedy="correct the key, or leave it out",
            )
    for name, writer in writers.items():
        if writer.num_masked == writer.num_tokens:
            raise CorpusError(
                f"the loss leaves out all of the {name} split",
                where="corpus.masked_key, corpus.weight_key",
                found=f"{writer.num_tokens:,} tokens, all masked",
                expected="something to train on",
            )
        if corpus.mark_keys.any:
            share = writer.num_masked / writer.num_tokens
            _log.info(f"{name}: the loss leaves out {writer.num_masked:,} tokens, {share:.1%}")


def _check_not_empty(
    writers: dict[str, TokenIndexWriter], corpus: CorpusConfig, num_documents: int
) -> None:
    if num_documents == 0:
        raise CorpusError(
            "the corpus is empty",
            where="corpus.paths",
            found="files, but no document with text in them",
        )
    for name, writer in writers.items():
        if writer.num_documents == 0:
            raise CorpusError(
                f"the {name} split is empty",
                where="corpus.held_out_fraction",
                found=f"{corpus.held_out_fraction} of {num_documents} documents",
                expected="at least one document in each split",
                remedy="use more documents, another corpus.seed, or "
                "corpus.held_out_fraction=0 for no held-out split",
            )


@contextmanager
def _building(output_dir: Path) -> Iterator[Path]:
    """A scratch folder that becomes `output_dir` on success and disappears on failure."""
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise CorpusError(
            "the output folder holds something else",
            where=output_dir,
            found=f"{min(path.name for path in output_dir.iterdir())} and no {RECORD}",
            expected="a new or empty folder, or a finished tokenisation",
            remedy="set corpus.output_dir to another folder",
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise CorpusError("corpus.output_dir is a file", where=output_dir)
    folder = output_dir.with_name(f"{output_dir.name}.part")
    with naming(output_dir):
        # What is in it was left by a run that was killed.
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    try:
        yield folder
        fsync_path(folder)
        folder.rename(output_dir)
        fsync_path(output_dir.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _describe(sources: SourceList) -> dict[str, Any]:
    return {
        "files": len(sources.files),
        "bytes": sources.num_bytes,
        "fingerprint": sources.fingerprint(),
        "stamp": sources.stamp(),
        # Of files that changed while they were read nobody knows what the tokens have.
        "content_sha256": sources.content_sha256() if sources.is_unchanged() else None,
        "empty_files_skipped": sources.num_empty,
        "repeated_files_skipped": sources.num_repeated,
    }


def _software(kind: str) -> dict[str, str]:
    library = "sentencepiece" if kind == "sentencepiece" else "tokenizers"
    packages = ("megatron-core", "numpy", library)
    return {"distill-pretrain": __version__, **{name: version(name) for name in packages}}


def _result(
    record: TokensRecord, output_dir: Path, sources: SourceList, *, already_done: bool
) -> TokenizeResult:
    return TokenizeResult(
        output_dir=output_dir,
        already_done=already_done,
        num_documents={name: part["num_documents"] for name, part in record.corpora.items()},
        num_tokens={name: part["num_tokens"] for name, part in record.corpora.items()},
        sources=sources,
    )
