"""Importing megatron-core quietly, and without the two seconds of it that a CPU has no use for."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

_MEGATRON = r"(.*[/\\])?megatron[./\\]"
"""Its modules by their names, and by their paths, as the compiler names them: it warns of escapes in docstrings."""
_NO_RANK = r"Could not determine (rank|world size) from torch\.distributed"
"""megatron-core 0.18 and later say so where a process that is no rank of a job opens a corpus."""
_NO_RUNTIME = "No CUDA runtime is found"
"""A CUDA build of torch says so on a machine without a GPU as megatron-core looks for what it could compile."""


def _is_news(record: logging.LogRecord) -> bool:
    return _NO_RUNTIME not in record.getMessage()


@contextlib.contextmanager
def importing_megatron() -> Iterator[None]:
    """Keep megatron-core's import quiet and quick; the block imports it.

    Its own warnings there concern optional packages. It hands its fused functions to torch.compile as it is imported,
    which loads the whole compiler; where there is no CUDA they are not in use, and stay as they are.
    """
    import torch

    warnings.filterwarnings("ignore", message=_NO_RANK)
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_news)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=_MEGATRON)
        if torch.cuda.is_available():
            yield
            return
        compile_function = torch.compile
        torch.compile = lambda function=None, **_: function or (lambda inner: inner)  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.compile = compile_function
