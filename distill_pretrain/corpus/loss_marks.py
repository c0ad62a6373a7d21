"""What a line of JSONL says of its text in the loss: spans of characters that are left out, a weight.

Positions of characters are those of Python's strings: Unicode code points, from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distill_pretrain.errors import ConfigError, CorpusError

MOST_WEIGHT = 1e6
"""Of a document: squares of gradients must stay within fp32."""

Offsets = npt.NDArray[np.int64]
"""int64[n, 2]: the characters [start, stop) of a text that each of its tokens stands for."""


class MarkKeys(NamedTuple):
    """Keys of a JSONL object beside its text; None for what is not looked for."""

    masked: str | None = None
    weight: str | None = None

    @property
    def any(self) -> bool:
        """Whether there is something to look for."""
        return self.masked is not None or self.weight is not None


@dataclass(frozen=True, kw_only=True)
class LossMarks:
    """What a document says of its part in the loss.

    Attributes:
        spans: characters [start, stop) whose tokens are left out; in any order, and they may overlap.
        whole: whether all of it is left out.
        weight: of its tokens beside those of other documents.
        where: file and line, for messages.
        seen: how many of the keys that were looked for it has.
    """

    spans: tuple[tuple[int, int], ...]
    whole: bool
    weight: float
    where: Callable[[], str]
    seen: MarkCount


class MarkCount(NamedTuple):
    """Documents that have each of the two keys."""

    masked: int
    weight: int


def marks_of(
    record: dict[str, Any], text: str, keys: MarkKeys, where: Callable[[], str]
) -> LossMarks:
    """Read the keys of a JSONL object; those that it lacks, or that are null, leave its text whole in the loss.

    Raises:
        CorpusError: a value is none that the key can have, or a span lies outside the text.
    """
    masked = None if keys.masked is None else record.get(keys.masked)
    weight = None if keys.weight is None else record.get(keys.weight)
    seen = MarkCount(masked is not None, weight is not None)
    spans: tuple[tuple[int, int], ...] = ()
    if isinstance(masked, list):
        spans = tuple(_span(span, text, keys, where) for span in masked)
    elif masked is not None and not isinstance(masked, bool):
        raise CorpusError(
            f"JSONL value of {keys.masked!r} does not say what the loss leaves out",
            where=where(),
            found=repr(masked)[:60],
            expected="true or false, or a list of [start, end) pairs of characters",
            remedy="correct the line, or set corpus.masked_key to another key",
        )
    return LossMarks(
        spans=spans,
        whole=masked is True,
        weight=1.0 if weight is None else _weight(weight, keys, where),
        where=where,
        seen=seen,
    )


def _span(value: Any, text: str, keys: MarkKeys, where: Callable[[], str]) -> tuple[int, int]:
    pair = isinstance(value, list) and len(value) == 2
    if not pair or not all(type(place) is int for place in value):
        raise CorpusError(
            f"JSONL value of {keys.masked!r} holds what is no span",
            where=where(),
            found=repr(value)[:60],
            expected="two whole numbers [start, end)",
            remedy="correct the line",
        )
    start, stop = value
    if not 0 <= start < stop <= len(text):
        raise CorpusError(
            "a span lies outside its text" if 0 <= start < stop else "a span has no characters",
            where=where(),
            found=f"[{start}, {stop})",
            expected=f"0 <= start < end <= {len(text)}, the characters (Unicode code points) of the text",
            remedy="count code points, as Python does, not bytes or UTF-16 units",
        )
    return start, stop


def _weight(value: Any, keys: MarkKeys, where: Callable[[], str]) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 <= value <= MOST_WEIGHT:
        raise CorpusError(
            f"JSONL value of {keys.weight!r} is no weight",
            where=where(),
            found=repr(value)[:60],
            expected=f"a number from 0 to {MOST_WEIGHT:g}",
            remedy="correct the line, or set corpus.weight_key to another key",
        )
    return float(value)


def masked_tokens(marks: LossMarks, text: str, offsets: Offsets) -> npt.NDArray[np.bool_]:
    """Say of each token of a text whether the loss leaves it out, bool[n].

    A token that stands for no character of its own, such as the first bytes of one that the vocabulary lacks, goes
    with the character behind it.

    Raises:
        CorpusError: a span begins or ends in the middle of a token.
    """
    starts, stops = offsets[:, 0], offsets[:, 1]
    masked = np.zeros(len(offsets), dtype=np.bool_)
    for span in marks.spans:
        for border in span:
            inside = np.flatnonzero((starts < border) & (border < stops))
            if len(inside):
                start, stop = offsets[inside[0]].tolist()
                raise CorpusError(
                    "a span begins or ends in the middle of a token",
                    where=marks.where(),
                    found=f"[{span[0]}, {span[1]}), and a token of characters [{start}, {stop}): {text[start:stop]!r}",
                    expected="borders between tokens",
                    remedy=f"move the border from {border} to {start} or {stop}",
                )
        masked |= (span[0] <= starts) & (starts < span[1])
    return masked


def without_offsets(what: str, found: str) -> ConfigError:
    """Make the error of a tokenizer with which spans of characters cannot become tokens."""
    return ConfigError(
        f"{what} does not tell which characters its tokens stand for",
        where="tokenizer.path, corpus.masked_key",
        found=found,
        expected="a tokenizer whose tokens make up the text, for spans that the loss leaves out",
        remedy="use a fast Hugging Face tokenizer (tokenizer.json), or mask whole documents",
    )
