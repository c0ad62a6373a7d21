"""What is in a text file or a line of JSONL: UTF-8, JSON, the text."""

from __future__ import annotations

import json
from collections.abc import Callable

from distill_pretrain.corpus.loss_marks import LossMarks, MarkKeys, marks_of
from distill_pretrain.corpus.source_file import SourceFile
from distill_pretrain.corpus.unpacking import UTF8_BOM, kind_of
from distill_pretrain.errors import CorpusError

LONGEST_DOCUMENT = (1 << 31) - 1
"""Bytes: the token files count the tokens of a document in 32 bits."""


def decode(data: bytes, offset: int, file: SourceFile) -> str:
    """Decode some bytes as UTF-8 text; they begin at an offset of the (unpacked) file.

    Raises:
        CorpusError: it is binary data, or not UTF-8.
    """
    if offset == 0 and data.startswith(UTF8_BOM):
        data, offset = data[len(UTF8_BOM) :], len(UTF8_BOM)
    packed = kind_of(data[:8]) if offset == 0 else None
    if packed is not None:
        raise CorpusError(
            "corpus file is not text",
            where=file.where,
            found=f"{packed} data",
            expected="UTF-8 text",
            remedy=f"unpack it first, or {file.remedy}",
        )
    zero = data.find(b"\0")
    if zero >= 0:
        raise CorpusError(
            "corpus file is not text",
            where=file.where,
            found=f"a NUL byte at offset {offset + zero} (binary data, or UTF-16)",
            expected="UTF-8 text",
            remedy=file.remedy,
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            "corpus file is not UTF-8",
            where=file.where,
            found=f"byte 0x{data[error.start]:02x} at offset {offset + error.start}",
            expected="UTF-8 text",
            remedy=file.remedy,
        ) from None


def json_document(
    line: str,
    file: SourceFile,
    text_key: str,
    mark_keys: MarkKeys,
    line_number: Callable[[], int],
) -> tuple[str, LossMarks | None]:
    """Return the text of a line of JSONL, and what it says of the loss; no text of an empty line.

    Args:
        line: the line.
        file: for messages.
        text_key: key of the text.
        mark_keys: of what is said of the loss.
        line_number: gives the number of the line, for messages.

    Raises:
        CorpusError: it is no JSON object with a text, or what it says of the loss makes no sense.
    """
    if not line.strip():
        return "", None

    def where() -> str:
        return f"{file.where}:{line_number()}"

    def bad_line(what: str, found: str, remedy: str | None = None) -> CorpusError:
        return CorpusError(what, where=where(), found=found, remedy=remedy)

    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise bad_line("JSONL line is not JSON", line.strip()[:60]) from None
    if not isinstance(record, dict):
        raise bad_line("JSONL line is not an object", line.strip()[:60])
    if text_key not in record:
        error = bad_line(
            f"JSONL line lacks the key {text_key!r}",
            f"keys {sorted(record)}",
            remedy="set corpus.text_key to the key of the text",
        )
        raise error
    text = record[text_key]
    if not isinstance(text, str):
        what = f"JSONL value of {text_key!r} is not text"
        raise bad_line(what, type(text).__name__)
    if not _is_encodable(text):
        what = f"JSONL value of {text_key!r} holds half of a surrogate pair"
        raise bad_line(what, "a lone \\ud800-\\udfff escape")
    return text, marks_of(record, text, mark_keys, where) if mark_keys.any else None


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def too_long(file: SourceFile, line: int | None) -> CorpusError:
    """Make the error for a document, or a line of JSONL, that is longer than any may be."""
    return CorpusError(
        "a document is too long",
        where=file.where if line is None else f"{file.where}:{line}",
        found=f"more than {LONGEST_DOCUMENT:,} bytes",
        expected="documents that fit into memory, of 2 GiB at most",
        remedy="cut it into several documents",
    )
