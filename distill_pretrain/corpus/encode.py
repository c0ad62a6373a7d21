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

import numpy as np
import numpy.typing as npt

from distill_pretrain.corpus.readers import Unit, read_documents
from distill_pretrain.corpus.tokenizers import Tokenizer
from distill_pretrain.errors import CorpusError

Ids = npt.NDArray[np.int32]
LoadTokenizer = Callable[[], Tokenizer]


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """Tokens of some units.

    Attributes:
        documents: int32 ids of each document, with the tokens that begin and end it.
        num_bytes: how much of the corpus this was.
    """

    documents: list[Ids]
    num_bytes: int


def encode_batch(tokenizer: Tokenizer, batch: Sequence[Unit], text_key: str) -> EncodedBatch:
    """Reads and encodes the documents of some units."""
    texts = [text for part in batch for text in read_documents(part, text_key)]
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    documents = [
        np.asarray([*begin, *ids, tokenizer.eod_id], dtype=np.int32)
        for ids in tokenizer.encode(texts)
    ]
    return EncodedBatch(documents=documents, num_bytes=sum(part.num_bytes for part in batch))


def encode_batches(
    batches: Iterable[Sequence[Unit]],
    *,
    load: LoadTokenizer,
    text_key: str,
    workers: int,
) -> Generator[EncodedBatch, None, None]:
    """Encodes batches, in their order, whatever the number of processes.

    Args:
        batches: what to encode; read as it is needed.
        load: every process loads the tokenizer with it.
        text_key: key of the text in a JSONL object.
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
            yield encode_batch(tokenizer, batch, text_key)
        return
    executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(load, text_key),
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


def _start_worker(load: LoadTokenizer, text_key: str) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = load(), text_key


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(batch: Sequence[Unit]) -> EncodedBatch:
    assert _worker is not None
    tokenizer, text_key = _worker
    return encode_batch(tokenizer, batch, text_key)
