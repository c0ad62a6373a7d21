"""Reading and decoding ahead of training, in a background thread."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType

import torch

from distill_pretrain.data.batches import HostBatch, StudentBatches


class PrefetchedBatches:
    """The batches of consecutive steps, the next ones prepared while the model works on the current one.

    Use it in a `with` block: leaving it ends the thread, after the step it is reading, whatever happened. The thread
    reads, decodes, packs and pins; `micro_batches` starts copies to the device, in stream order. Results are those of
    `StudentBatches.host_batches`. Meanwhile nobody else may use the batches. Leaving the block ends their threads, too.

    Args:
        batches: where they come from.
        steps: which steps will be asked for, in this order.
        depth: steps prepared ahead; 0 prepares each when it is asked for, without a thread.
        with_targets: whether this rank computes the loss.
    """

    def __init__(
        self, batches: StudentBatches, *, steps: range, depth: int, with_targets: bool
    ) -> None:
        self._batches = batches
        self._steps = iter(steps)
        self._depth = depth
        self._with_targets = with_targets
        self._ahead: deque[tuple[int, Future[list[HostBatch]]]] = deque()
        self._thread: ThreadPoolExecutor | None = None

    def __enter__(self) -> PrefetchedBatches:
        if self._depth:
            device = self._batches.device
            # A new thread would pin its memory through GPU 0, whichever is this process's.
            choose_gpu = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
            self._thread = ThreadPoolExecutor(1, "prefetch", choose_gpu)
            for _ in range(self._depth):
                self._prepare_next(self._thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
        self._batches.close()
        self._ahead.clear()

    def host_batches(self, step: int) -> list[HostBatch]:
        """Return this rank's micro-batches of the next step; raise what its preparation raised."""
        if self._thread is None:
            assert self._depth == 0, "outside the with block"
            return self._batches.host_batches(step, self._with_targets)
        expected, prepared = self._ahead.popleft()
        assert step == expected, (step, expected)
        self._prepare_next(self._thread)
        return prepared.result()

    def _prepare_next(self, thread: ThreadPoolExecutor) -> None:
        step = next(self._steps, None)
        if step is not None:
            future = thread.submit(self._batches.host_batches, step, self._with_targets)
            self._ahead.append((step, future))
