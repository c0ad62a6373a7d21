"""One exception family. A message says what is wrong, where, what was found, what was expected, and the remedy.

Everything a user can cause is a subclass of `DistillPretrainError`; the command line prints it without a
traceback and exits with status 2. `assert` is for our own bugs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any


class DistillPretrainError(Exception):
    """Base of every error a user can cause.

    Args:
        what: one clause naming the problem.
        where: file, recipe key, shard or block.
        found: the offending value.
        expected: what would have been right.
        remedy: what the user can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        parts = [what]
        for label, value in (("where", where), ("found", found), ("expected", expected)):
            if value is not None:
                parts.append(f"{label}: {value}")
        if remedy is not None:
            parts.append(f"remedy: {remedy}")
        super().__init__("; ".join(parts))
        self.what = what
        self.where = where
        self.found = found

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """Pickle without calling `__init__`, whose arguments are not those that the message keeps."""
        return _without_init, (type(self), self.args), self.__dict__


def _without_init(kind: type[DistillPretrainError], args: tuple[Any, ...]) -> DistillPretrainError:
    return kind.__new__(kind, *args)


class ConfigError(DistillPretrainError):
    """The recipe is wrong; carries every problem found, not only the first."""


def require_whole(name: str, value: object, *, least: int, most: int | None = None) -> None:
    """Raise ConfigError where the argument `name` of a function is no integer from `least` to `most`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if number < least or (most is not None and number > most):
        upper = "" if most is None else f" and at most {most}"
        raise ConfigError(
            "an argument is none that the function takes",
            where=name,
            found=repr(value),
            expected=f"a whole number of at least {least}{upper}",
        )


class LayoutError(ConfigError):
    """The parallel layout does not fit the model or the number of processes."""


class LaunchError(DistillPretrainError):
    """The processes of a job cannot meet."""


class InUse(DistillPretrainError):
    """Another process writes the file or folder; the message says which one, and since when."""


class StorageError(DistillPretrainError):
    """A file or folder cannot be read or written: not there, not permitted, the disk full."""


class CorpusError(DistillPretrainError):
    """A text corpus cannot be read."""


class TokenDataError(DistillPretrainError):
    """A tokenised corpus (.bin/.idx) is missing, truncated or out of bounds."""


class TokenizerMismatch(DistillPretrainError):
    """A tokenizer does not belong to the data or the model it is used with."""


class CacheError(DistillPretrainError):
    """Base of every error about the sparse-logit cache."""


class CacheUnreadable(CacheError):
    """Disk, network or store failed while a cache was read; another attempt may succeed."""


class CacheCorrupt(CacheError):
    """Bytes of a cache are not what was written."""


class CacheMismatch(CacheError):
    """A sound cache, made from something else than what it is used with."""


class CacheIncomplete(CacheError):
    """A capture has not finished."""


class LossInputError(DistillPretrainError):
    """Logits, labels or targets of which there is no loss."""


class CheckpointError(DistillPretrainError):
    """A checkpoint is missing, damaged or of another model."""


class TrainingStopped(DistillPretrainError):
    """Training ended before its last step, as its recipe says it should."""


class TeacherError(DistillPretrainError):
    """The teacher cannot be loaded or produced unusable logits."""


class MissingDependency(DistillPretrainError):
    """An optional package is needed; the message carries the line that installs it.

    Args:
        package: as pip names it.
        extra: of this package, that brings it; None if none does.
        needed_for: what the user wanted.
    """

    def __init__(self, package: str, *, extra: str | None = None, needed_for: str) -> None:
        wanted = package if extra is None else f"distill-pretrain[{extra}]"
        super().__init__(
            f"{package} is not installed",
            expected=f"{package}, needed for {needed_for}",
            remedy=f"pip install '{wanted}'",
        )
