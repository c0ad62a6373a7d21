"""The order of documents: a hash of the seed and the document's number, written out so that no library decides it.

Legend: D documents.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def document_order(num_documents: int, seed: int) -> npt.NDArray[np.int64]:
    """Order documents by a 64-bit hash of (seed, document number); int64[D].

    The hash is splitmix64 (Steele, Lea, Flood 2014) started at mix(seed); it is written out here
    so that the order never depends on a library's generator. It is one to one: no two documents have the same.
    """
    return np.argsort(order_keys(np.arange(num_documents), seed), kind="stable")


def order_keys(documents: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
    """Return the hashes, uint64[n], that documents of the numbers int64[n] are sorted by."""
    start = mix64(np.array([seed], np.uint64) + _GOLDEN)
    return mix64(start + (documents.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Compute the output function of splitmix64 (Steele, Lea, Flood 2014), element by element."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
