"""Reading again what a disk, a network or a store failed to give."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from distill_pretrain.errors import CacheUnreadable
from distill_pretrain.processes.logs import ANY_RANK
from distill_pretrain.processes.watchdog import alive

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
SIGN_OF_LIFE_S = 1.0


def wait_alive(seconds: float) -> None:
    """Wait, and say all along that this process lives: a rank that waits here between retries is not stuck."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        alive()
        time.sleep(min(left, SIGN_OF_LIFE_S))


def read_with_retries(
    read: Callable[[], Result],
    *,
    retry_s: float,
    sleep: Callable[[float], None] = wait_alive,
) -> Result:
    """Return what `read` returns, tried again after waits that double, each announced by a warning.

    Only failures of the storage are tried again: damaged or foreign data would be found again.

    Args:
        read: may be called several times.
        retry_s: seconds of waiting in all; 0 tries once.
        sleep: waits.

    Raises:
        CacheUnreadable: the last failure, which names the file.
    """
    wait, waited = FIRST_WAIT_S, 0.0
    while True:
        try:
            return read()
        except CacheUnreadable as error:
            wait = min(wait, retry_s - waited)
            if wait <= 0:
                raise
            _log.warning(f"{error}; trying again in {wait:g} s", extra=ANY_RANK)
        sleep(wait)
        waited += wait
        wait = min(2 * wait, LONGEST_WAIT_S)
