"""The texts of a column of Parquet and Arrow files, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from distill_pretrain.corpus.source_file import SourceFile
from distill_pretrain.corpus.unpacking import ARROW_FILE, PARQUET, Opened, pyarrow
from distill_pretrain.errors import CorpusError, DistillPretrainError

ROWS = 512
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def table_texts(source: Opened, file: SourceFile, key: str) -> Iterator[tuple[list[str], int]]:
    """Yield the column's texts in the order of the rows, some rows at a time.

    Args:
        source: the file, open.
        file: for messages.
        key: name of the column.

    Yields:
        Texts, none of them null, and how many bytes of the file have been used up by then.

    Raises:
        CorpusError: the file is damaged, or has no such column of text, or a row has no text.
        MissingDependency: pyarrow is not installed.
    """
    pyarrow("", needed_for=f"reading {source.kind} files ({file.where})")
    read = _parquet if source.kind == PARQUET else _arrow
    row = 0
    for column, used in read(source, file, key):
        yield _texts(column, file, key, row), used
        row += len(column)


def _parquet(source: Opened, file: SourceFile, key: str) -> Iterator[tuple[Any, int]]:
    parquet = pyarrow("parquet", needed_for="reading Parquet files")
    with _reading(file, source.kind, "its footer"):
        table = parquet.ParquetFile(source.content, page_checksum_verification=True)
    _require_text(table.schema_arrow, file, key)
    done = 0
    for group in range(table.num_row_groups):
        with _reading(file, source.kind, f"row group {group}"):
            for batch in table.iter_batches(ROWS, row_groups=[group], columns=[key]):
                done += batch.num_rows
                yield batch.column(0), file.size * done // table.metadata.num_rows


def _arrow(source: Opened, file: SourceFile, key: str) -> Iterator[tuple[Any, int]]:
    ipc = pyarrow("ipc", needed_for="reading Arrow files")
    with _reading(file, source.kind, "its beginning"):
        is_file = source.kind == ARROW_FILE
        reader = (ipc.open_file if is_file else ipc.open_stream)(source.content)
    _require_text(reader.schema, file, key)
    place = reader.schema.get_field_index(key)
    if is_file:
        for number in range(reader.num_record_batches):
            with _reading(file, source.kind, f"record batch {number}"):
                column = reader.get_batch(number).column(place)
            yield from _pieces(column, file.size * number // reader.num_record_batches)
        return
    number = 0
    while True:
        with _reading(file, source.kind, f"record batch {number}"):
            try:
                column = reader.read_next_batch().column(place)
            except StopIteration:
                break
        yield from _pieces(column, source.stored.position)
        number += 1
    _require_end(source.content, file, number)


def _pieces(column: Any, used: int) -> Iterator[tuple[Any, int]]:
    for start in range(0, len(column), ROWS):
        yield column.slice(start, ROWS), used


def _require_end(content: BinaryIO, file: SourceFile, num_batches: int) -> None:
    """Refuse a stream that stops between two batches: what reads it takes that for its end."""
    content.seek(file.size - len(_END_OF_STREAM))
    if content.read() != _END_OF_STREAM:
        raise CorpusError(
            "the Arrow file is cut off",
            where=f"{file.where}, behind record batch {num_batches - 1}",
            found="no mark of its end",
            remedy=f"copy or download the file again, or {file.remedy}",
        )


def _require_text(schema: Any, file: SourceFile, key: str) -> None:
    types = pyarrow("types", needed_for="reading tables")
    if key not in schema.names:
        raise CorpusError(
            f"the table lacks the column {key!r}",
            where=file.where,
            found=f"columns {sorted(schema.names)}",
            remedy="set corpus.text_key to the column of the text",
        )
    kind = schema.field(key).type
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(plain) or types.is_large_string(plain) or str(plain) == "string_view"):
        raise CorpusError(
            f"the column {key!r} is not text",
            where=file.where,
            found=kind,
            expected="string",
            remedy="set corpus.text_key to the column of the text",
        )


def _texts(column: Any, file: SourceFile, key: str, first_row: int) -> list[str]:
    if column.null_count:
        row = first_row + column.is_null().to_pylist().index(True)
        raise CorpusError(
            f"a row has no text in the column {key!r}",
            where=f"{file.where}, row {row} (the first is 0)",
            found="null",
            expected="text, which may be empty",
            remedy="write the file again without such rows",
        )
    try:
        texts: list[str] = column.to_pylist()
    except UnicodeDecodeError:
        for row, value in enumerate(column, first_row):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise CorpusError(
                    "corpus file is not UTF-8",
                    where=f"{file.where}, row {row} (the first is 0)",
                    found=f"byte 0x{error.object[error.start]:02x} at offset {error.start} of the text",
                    expected="UTF-8 text",
                    remedy=file.remedy,
                ) from None
        raise
    return texts


@contextmanager
def _reading(file: SourceFile, kind: str | None, part: str) -> Iterator[None]:
    """Errors of pyarrow as ones that say where."""
    try:
        yield
    except (DistillPretrainError, StopIteration, GeneratorExit):
        raise
    except Exception as error:
        raise CorpusError(
            f"the {kind} file is damaged or cut off",
            where=f"{file.where}, {part}",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            remedy=f"copy or download the file again, or {file.remedy}",
        ) from None
