"""The entropy codec's fast coder: finds the library built from _hc.c and calls it through ctypes, without the GIL.

Legend: T positions of the block, E entries in all.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_pretrain.cache.codec.hc.oracle import (
    COUNT_TOO_LARGE,
    PADDING,
    RANK_TOO_LARGE,
    TOO_MANY_ENTRIES,
    WRONG_ENTRIES,
    WRONG_LENGTH,
    Arrays,
    Oracle,
    broken,
)
from distill_pretrain.cache.codec.hc.tables import HcTables, address
from distill_pretrain.errors import CacheError

ABI = 2
HOW_TO_BUILD = "install a wheel, or pip install -e . with a C compiler (such as gcc) on PATH"
SLOW_VARIABLE = "DISTILL_PRETRAIN_SLOW_CODER"
"""Set to 1, the coder in Python takes the place of one that was not built; setup.py reads it too."""

_RULES = (
    TOO_MANY_ENTRIES,
    RANK_TOO_LARGE,
    COUNT_TOO_LARGE,
    WRONG_ENTRIES,
    WRONG_LENGTH,
    PADDING,
)
_SLACK = 8


class NativeCoder:
    """The coder in C; it gives the same bytes and errors as `Oracle`."""

    def __init__(self, library: Path) -> None:
        """Loads the library.

        Raises:
            OSError: it cannot be loaded, or was built from another version of _hc.c.
        """
        self._library = ctypes.CDLL(str(library))
        abi = self._library.hc_abi() if hasattr(self._library, "hc_abi") else None
        if abi != ABI:
            raise OSError(f"{library} has interface {abi}, expected {ABI}")
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        decode, encode = self._library.hc_decode, self._library.hc_encode
        decode.argtypes = [number, pointer, size, size, size, number, number, *[pointer] * 5]
        decode.restype = number
        encode.argtypes = [number, *[pointer] * 3, size, number, *[pointer] * 4, size]
        encode.restype = size

    def encode(
        self,
        tables: HcTables,
        lengths: npt.NDArray[np.int32],
        ids: npt.NDArray[np.int32],
        codes: npt.NDArray[np.int32],
    ) -> bytes:
        """Encode rows: lengths int32[T], ids int32[E], counts or log-probability codes int32[E]."""
        out = np.empty(tables.payload_bounds(len(lengths), len(ids))[1] + _SLACK, np.uint8)
        # Held until C is done: from Python 3.12 on two threads may both make a cached property, and one's is freed.
        ranks, words = tables.ranks_by_id, tables.codes
        size = self._library.hc_encode(
            tables.kind == "counts",
            _pointer(lengths),
            _pointer(ids),
            _pointer(codes),
            len(lengths),
            tables.num_draws,
            _pointer(ranks),
            _pointer(words),
            _pointer(tables.code_lengths),
            _pointer(out),
            len(out),
        )
        assert size >= 0, "an id comes twice at one position" if size == -2 else "payload bound"
        return out[:size].tobytes()

    def decode(
        self, tables: HcTables, payload: bytes | memoryview, num_tokens: int, num_entries: int
    ) -> Arrays:
        """Return what `encode` was given, each row by ascending frequency rank.

        Raises:
            CacheCorrupt: a rule of FORMAT.md is broken.
        """
        raw = np.frombuffer(payload, np.uint8)
        out = np.empty(num_tokens + 2 * num_entries, np.int32)
        first_id, first_code = num_tokens, num_tokens + num_entries
        start = _pointer(out)
        lookup = tables.lookup  # held, as above
        status = self._library.hc_decode(
            tables.kind == "counts",
            _pointer(raw),
            len(raw),
            num_tokens,
            num_entries,
            tables.num_draws,
            tables.vocab_size,
            _pointer(lookup),
            _pointer(tables.ids_by_rank),
            start,
            start + 4 * first_id,
            start + 4 * first_code,
        )
        if status:
            raise broken(_RULES[status - 1])
        return out[:first_id], out[first_id:first_code], out[first_code:]


def find_library() -> Path | None:
    """Return the path of the compiled library, if it was built."""
    stem = Path(__file__).with_name("_hc")
    # "_hc.so" is the last of them; the others are what builds in place were called before.
    files = (stem.with_name(stem.name + suffix) for suffix in reversed(EXTENSION_SUFFIXES))
    return next((file for file in files if file.is_file()), None)


def load() -> NativeCoder:
    """Load the fast coder.

    Raises:
        OSError: it was not built, or cannot be loaded.
    """
    library = find_library()
    if library is None:
        raise OSError("the fast coder of the entropy codec was not built")
    return NativeCoder(library)


@cache
def best_coder() -> NativeCoder | Oracle:
    """Return the fast coder; the slow one, after one warning, where there is no fast one and the user asked for it.

    Raises:
        CacheError: there is no fast coder, and `SLOW_VARIABLE` is not set to 1.
    """
    try:
        return load()
    except OSError as error:
        if os.environ.get(SLOW_VARIABLE) != "1":
            raise CacheError(
                f"{error}",
                where=Path(__file__).parent,
                remedy=f"{HOW_TO_BUILD}; or set {SLOW_VARIABLE}=1, to read and write caches hundreds of times slower",
            ) from error
        warnings.warn(
            f"{error}; a cache is read and written hundreds of times slower; {HOW_TO_BUILD}",
            stacklevel=2,
        )
        return Oracle()


def _pointer(array: npt.NDArray[Any]) -> int:
    assert array.flags.c_contiguous
    return address(array)
