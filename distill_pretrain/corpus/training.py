"""Training a sentencepiece tokenizer on a sample of the corpus."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Iterator

from distill_pretrain.corpus.config import CorpusConfig, TokenizerConfig
from distill_pretrain.corpus.readers import (
    Slice,
    batches_of,
    is_sliced,
    read_documents,
    read_sample,
)
from distill_pretrain.corpus.sources import SourceList
from distill_pretrain.corpus.tokenizers import SentencePieceTokenizer
from distill_pretrain.errors import ConfigError, CorpusError

SAMPLE_BYTES = 1 << 16
LEAST_SAMPLE = 0.9
"""Share of `training_bytes` that has to be missing for more than the chosen slices to be read."""


def train_tokenizer(
    corpus: CorpusConfig, tokenizer: TokenizerConfig, sources: SourceList
) -> SentencePieceTokenizer:
    """Trains a sentencepiece tokenizer on a sample of the corpus; the same corpus gives the same bytes.

    Text survives it unchanged, tabs, newlines and runs of spaces included, with one exception: sentencepiece
    itself writes spaces as U+2581, so that character comes back as a space.

    Raises:
        ConfigError: the vocabulary is too large or too small for the sample.
    """
    import sentencepiece

    model = io.BytesIO()
    found: list[CorpusError] = []

    def sample() -> Iterator[str]:
        # sentencepiece turns what its iterator raises into a RuntimeError with a traceback in it.
        try:
            yield from _sample(corpus, tokenizer, sources)
        except CorpusError as error:
            found.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sample(),
            model_writer=model,
            vocab_size=tokenizer.vocab_size,
            model_type=tokenizer.model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * SAMPLE_BYTES,
            # The model file records the number of threads, and merges may depend on it.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if found:
            raise found[0] from None
        # "INTERNAL: file(line) [condition] sentence."
        reason = str(error).rpartition("] ")[2].strip() or str(error).strip()
        if "ocabulary size" not in str(error):
            raise ConfigError(
                "sentencepiece cannot train a tokenizer on this corpus",
                where="corpus.paths",
                found=reason,
                remedy="use more text, or name a ready tokenizer in tokenizer.path",
            ) from None
        raise ConfigError(
            "a tokenizer of this size cannot be trained on this corpus",
            where="tokenizer.vocab_size",
            found=f"{tokenizer.vocab_size}: {reason}",
            remedy="set tokenizer.vocab_size accordingly, or raise tokenizer.training_bytes",
        ) from None
    return SentencePieceTokenizer(
        model.getvalue(),
        where="tokenizer trained from the corpus",
        bos=tokenizer.bos,
        end_of_document=tokenizer.end_of_document,
    )


def _sample(corpus: CorpusConfig, tokenizer: TokenizerConfig, sources: SourceList) -> Iterator[str]:
    """Pieces of text from all over the corpus, in corpus order, of `training_bytes` at most."""
    if all(map(is_sliced, sources.files)):
        yield from _sample_of_slices(corpus, tokenizer, sources)
    else:
        yield from _thinned(_every_piece(corpus, sources), tokenizer.training_bytes)


def _every_piece(corpus: CorpusConfig, sources: SourceList) -> Iterator[str]:
    for batch in batches_of(sources, corpus.text_key):
        for part in batch:
            for text in read_documents(part, corpus.text_key):
                for start in range(0, len(text), SAMPLE_BYTES):
                    yield text[start : start + SAMPLE_BYTES]


def _thinned(pieces: Iterable[str], num_bytes: int) -> Iterator[str]:
    """All of the pieces where they fit into so many bytes, or every 2nd, 4th, 8th ..., in order.

    Of what is unpacked on the way nobody knows the size, or can read the middle alone. At most twice `num_bytes` are
    held.
    """
    kept: list[str] = []
    every, size = 1, 0
    for number, piece in enumerate(pieces):
        if number % every:
            continue
        kept.append(piece)
        size += len(piece.encode("utf-8"))
        while size > num_bytes and len(kept) > 1:
            kept = kept[::2]
            every *= 2
            size = sum(len(piece.encode("utf-8")) for piece in kept)
    if size > num_bytes:
        kept = [_cut(piece, num_bytes) for piece in kept]
    yield from kept


def _sample_of_slices(
    corpus: CorpusConfig, tokenizer: TokenizerConfig, sources: SourceList
) -> Iterator[str]:
    """The same where any part of a file can be read alone."""
    every = [
        Slice(file=file, start=start, end=min(start + SAMPLE_BYTES, file.size))
        for file in sources.files
        for start in range(0, file.size, SAMPLE_BYTES)
    ]
    parts = every
    if sources.num_bytes > tokenizer.training_bytes:
        parts = _choose(every, tokenizer.training_bytes)
    left = tokenizer.training_bytes
    for piece in _pieces(parts, corpus.text_key):
        size = len(piece.encode("utf-8"))
        if size > left:
            yield _cut(piece, left)
            return
        left -= size
        yield piece
    if left < LEAST_SAMPLE * tokenizer.training_bytes:
        return
    # In lines longer than a slice hardly any of the chosen slices has the start of one: take what comes.
    chosen = set(parts)
    for piece in _pieces((part for part in every if part not in chosen), corpus.text_key):
        size = len(piece.encode("utf-8"))
        yield _cut(piece, left)
        left -= size
        if left <= 0:
            return


def _pieces(parts: Iterable[Slice], text_key: str) -> Iterator[str]:
    for part in parts:
        for text in read_sample(part, text_key):
            for start in range(0, len(text), SAMPLE_BYTES):
                yield text[start : start + SAMPLE_BYTES]


def _cut(text: str, num_bytes: int) -> str:
    """The beginning of a text, of so many bytes of UTF-8 at most."""
    return text.encode("utf-8")[:num_bytes].decode("utf-8", "ignore")


def _choose(parts: list[Slice], num_bytes: int) -> list[Slice]:
    order = list(range(len(parts)))
    random.Random(0).shuffle(order)
    chosen = []
    for index in order:
        if num_bytes <= 0:
            break
        chosen.append(index)
        num_bytes -= parts[index].end - parts[index].start
    return [parts[index] for index in sorted(chosen)]
