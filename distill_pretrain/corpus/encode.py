"""Documents to token ids, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distill_pretrain.corpus.readers import Unit, read_documents
from distill_pretrain.corpus.tokenizers import Tokenizer, load_tokenizer
from distill_pretrain.errors import CorpusError

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """Tokens of some units.

    Attributes:
        documents: int32 ids of each document, end-of-document token included.
        num_bytes: how much of the corpus this was.
    """

    documents: list[Ids]
    num_bytes: int


def encode_batch(tokenizer: Tokenizer, batch: Sequence[Unit], text_key: str) -> EncodedBatch:
    """Reads and encodes the documents of some units."""
    texts = [text for part in batch for text in read_documents(part, text_key)]
    documents = [
        np.asarray([*ids, tokenizer.eod_id], dtype=np.int32) for ids in tokenizer.encode(texts)
    ]
    return EncodedBatch(documents=documents, num_bytes=sum(part.num_bytes for part in batch))


def encode_batches(
    batches: Iterable[Sequence[Unit]],
    *,
    kind: str,
    tokenizer_path: Path,
    text_key: str,
    workers: int,
) -> Generator[EncodedBatch, None, None]:
    """Encodes batches, in their order, whatever the number of processes.

    Args:
        batches: what to encode; read as it is needed.
        kind: of the tokenizer.
        tokenizer_path: every process loads the tokenizer from here.
        text_key: key of the text in a JSONL object.
        workers: processes; 0 means one per CPU core this process may use.
    """
    workers = workers or len(os.sched_getaffinity(0))
    batches = iter(batches)
    first = list(islice(batches, workers))
    workers = min(workers, len(first))
    batches = chain(first, batches)
    if workers <= 1:
        tokenizer = load_tokenizer(kind, tokenizer_path)
        for batch in batches:
            yield encode_batch(tokenizer, batch, text_key)
        return
    executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(kind, tokenizer_path, text_key),
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


_worker: tuple[Tokenizer, str] | None = None


def _start_worker(kind: str, tokenizer_path: Path, text_key: str) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = load_tokenizer(kind, tokenizer_path), text_key


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(batch: Sequence[Unit]) -> EncodedBatch:
    assert _worker is not None
    tokenizer, text_key = _worker
    return encode_batch(tokenizer, batch, text_key)
