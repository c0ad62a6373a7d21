"""Documents to token ids, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import wait
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distill_pretrain.corpus.loss_marks import LossMarks, MarkCount, MarkKeys, masked_tokens
from distill_pretrain.corpus.readers import Unit, read_marked
from distill_pretrain.corpus.tokenizers import Tokenizer
from distill_pretrain.errors import CorpusError

Ids = npt.NDArray[np.int32]
LoadTokenizer = Callable[[], Tokenizer]


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """The tokens of some units.

    Attributes:
        documents: each of them.
        num_bytes: how much of the corpus this was.
        marked: documents that have each of the two keys of `MarkKeys`.
    """

    documents: list[EncodedDocument]
    num_bytes: int
    marked: MarkCount


class EncodedDocument(NamedTuple):
    """A document.

    Attributes:
        ids: int32[n], with the tokens that begin and end it.
        masked: bool[n], of tokens that the loss leaves out; None where there are none.
        weight: in the loss; 0 leaves all of it out.
    """

    ids: Ids
    masked: npt.NDArray[np.bool_] | None = None
    weight: float = 1.0


class Keys(NamedTuple):
    """What is read of a JSONL object: the key of its text, and those of what it says of the loss."""

    text: str
    marks: MarkKeys = MarkKeys()


def encode_batch(tokenizer: Tokenizer, batch: Sequence[Unit], keys: Keys) -> EncodedBatch:
    """Reads and encodes the documents of some units."""
    read = [pair for part in batch for pair in read_marked(part, keys.text, keys.marks)]
    texts, marks = [text for text, _ in read], [mark for _, mark in read]
    documents: list[EncodedDocument] = []
    if not any(mark and mark.spans for mark in marks):
        documents = [
            _document(tokenizer, ids, mark)
            for ids, mark in zip(tokenizer.encode(texts), marks, strict=True)
        ]
    else:
        encoded = tokenizer.encode_with_offsets(texts)
        for text, mark, (ids, offsets) in zip(texts, marks, encoded, strict=True):
            masked = masked_tokens(mark, text, offsets) if mark and mark.spans else None
            documents.append(_document(tokenizer, ids, mark, masked))
    seen = [mark.seen for mark in marks if mark is not None]
    return EncodedBatch(
        documents=documents,
        num_bytes=sum(part.num_bytes for part in batch),
        marked=MarkCount(sum(one.masked for one in seen), sum(one.weight for one in seen)),
    )


def _document(
    tokenizer: Tokenizer,
    ids: list[int],
    mark: LossMarks | None,
    masked: npt.NDArray[np.bool_] | None = None,
) -> EncodedDocument:
    """Make the document of some ids, of which `masked` are left out of the loss; its first and last token are not."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    whole = np.asarray([*begin, *ids, tokenizer.eod_id], dtype=np.int32)
    if mark is None:
        return EncodedDocument(whole)
    if mark.whole:
        return EncodedDocument(whole, weight=0.0)
    if masked is not None:
        masked = np.pad(masked, (len(begin), 1))
    return EncodedDocument(whole, masked, mark.weight)


def encode_batches(
    batches: Iterable[Sequence[Unit]],
    *,
    load: LoadTokenizer,
    keys: Keys,
    workers: int,
) -> Generator[EncodedBatch, None, None]:
    """Encodes batches, in their order, whatever the number of processes.

    Args:
        batches: what to encode; read as it is needed.
        load: every process loads the tokenizer with it.
        keys: of a JSONL object.
        workers: processes; 0 means one per CPU core this process may use.
    """
    workers = workers or len(os.sched_getaffinity(0))
    batches = iter(batches)
    first = list(islice(batches, workers))
    workers = min(workers, len(first))
    batches = chain(first, batches)
    if workers <= 1:
        tokenizer = load()
        for batch in batches:
            yield encode_batch(tokenizer, batch, keys)
        return
    executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(load, keys),
    )
    # Few results wait at a time, so that memory does not grow with the corpus.
    waiting: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in batches:
            waiting.append(executor.submit(_encode_in_worker, batch))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise CorpusError(
            "a tokenising process died",
            where="corpus.workers",
            found="it was killed, most likely for want of memory",
            remedy="set corpus.workers to a smaller number",
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


_worker: tuple[Tokenizer, Keys] | None = None


def _start_worker(load: LoadTokenizer, keys: Keys) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = load(), keys


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(batch: Sequence[Unit]) -> EncodedBatch:
    assert _worker is not None
    tokenizer, keys = _worker
    return encode_batch(tokenizer, batch, keys)
