"""One exception family. A message says what is wrong, where, what was found, what was expected, and the remedy.

Everything a user can cause is a subclass of `DistillPretrainError`; the command line prints it without a
traceback and exits with status 2. `assert` is for our own bugs.
"""

from __future__ import annotations


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


class ConfigError(DistillPretrainError):
    """The recipe is wrong; carries every problem found, not only the first."""


class LayoutError(ConfigError):
    """The parallel layout does not fit the model or the number of processes."""


class CorpusError(DistillPretrainError):
    """A text corpus cannot be read."""


class TokenDataError(DistillPretrainError):
    """A tokenised corpus (.bin/.idx) is missing, truncated or out of bounds."""


class TokenizerMismatch(DistillPretrainError):
    """A tokenizer does not belong to the data or the model it is used with."""


class CacheError(DistillPretrainError):
    """Base of every error about the sparse-logit cache."""


class CacheCorrupt(CacheError):
    """Bytes of a cache are not what was written."""


class CacheMismatch(CacheError):
    """A sound cache, made from something else than what it is used with."""


class CacheIncomplete(CacheError):
    """A capture has not finished."""


class CheckpointError(DistillPretrainError):
    """A checkpoint is missing, damaged or of another model."""


class TeacherError(DistillPretrainError):
    """The teacher cannot be loaded or produced unusable logits."""


class MissingDependency(DistillPretrainError):
    """An optional package is needed; the message carries the line that installs it."""

    def __init__(self, package: str, *, extra: str, needed_for: str) -> None:
        super().__init__(
            f"{package} is not installed",
            expected=f"{package}, needed for {needed_for}",
            remedy=f"pip install 'distill-pretrain[{extra}]'",
        )
