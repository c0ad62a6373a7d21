"""What ids stand for, for those who only show text: read without the seconds that transformers takes to import."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from distill_pretrain.corpus.recorded_tokenizer import load_recorded_tokenizer, tokenizer_sha256
from distill_pretrain.corpus.tokens_record import TokensRecord

_FILE = "tokenizer.json"


class TokenNames(Protocol):
    """The part of a `Tokenizer` that shows ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids."""
        ...

    def id_to_piece(self, token_id: int) -> str:
        """Return the token as the vocabulary writes it."""
        ...


class FastTokenNames:
    """Those of a tokenizer.json.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_file(str(path))

    def decode(self, ids: Sequence[int]) -> str:
        """See `TokenNames`; special tokens are shown."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def id_to_piece(self, token_id: int) -> str:
        """See `TokenNames`."""
        return str(self._tokenizer.id_to_token(int(token_id)))


def recorded_token_names(folder: Path, record: TokensRecord) -> TokenNames:
    """Open the tokenizer stored in a tokens folder, to show ids; by its tokenizer.json alone where it has one.

    Raises:
        TokenizerMismatch: it is not the one that made the tokens.
        ConfigError, MissingDependency: it cannot be loaded.
    """
    made_by = record.tokenizer
    path = folder / made_by["file"]
    is_plain = made_by["kind"] == "hf" and (path / _FILE).is_file()
    if is_plain and tokenizer_sha256("hf", path) == made_by["sha256"]:
        # The library raises a bare Exception, and may not be installed; the other way says why.
        with suppress(Exception):
            return FastTokenNames(path / _FILE)
    return load_recorded_tokenizer(folder, record)
