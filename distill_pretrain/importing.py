"""Importing megatron-core quietly, and without the two seconds of it that a CPU has no use for."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def importing_megatron() -> Iterator[None]:
    """For the block that imports megatron-core.

    Its warnings there concern optional packages. It hands its fused functions to torch.compile as it is imported, which
    loads the whole compiler; where there is no CUDA they are not in use, and stay as they are.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            yield
            return
        compile_function = torch.compile
        torch.compile = lambda function=None, **_: function or (lambda inner: inner)  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.compile = compile_function
