"""The tokens between documents: which begins and which ends one, and how a corpus shows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill_pretrain.errors import ConfigError

if TYPE_CHECKING:
    from distill_pretrain.corpus.config import BosMode
    from distill_pretrain.corpus.token_index import TokenIndex
    from distill_pretrain.corpus.token_names import TokenNames
    from distill_pretrain.corpus.tokenizers import Tokenizer

FIRST_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class FoundTokens:
    """Special tokens that a tokenizer knows of itself.

    Attributes:
        bos: id of its BOS token, if it has one.
        begins_with_bos: whether it puts that before a text by itself.
        eos: id of its eos token, if it has one.
        vocab_size: V.
    """

    bos: int | None
    begins_with_bos: bool
    eos: int | None
    vocab_size: int

    def begin(self, mode: BosMode, *, where: object) -> int | None:
        """Return the id that begins a document; None for none.

        Raises:
            ConfigError: there always has to be one, and the tokenizer has none.
        """
        if mode == "always" and self.bos is None:
            raise ConfigError(
                "the tokenizer has no BOS token",
                where=where,
                found="tokenizer.bos: always",
                remedy="set tokenizer.bos=never, or bos_token in the tokenizer's tokenizer_config.json",
            )
        wanted = mode == "always" or (mode == "auto" and self.begins_with_bos)
        return self.bos if wanted else None

    def end(
        self, token: str | int | None, id_of: Callable[[str], int | None], *, where: object
    ) -> int:
        """Return the id that ends a document.

        Args:
            token: a token, an id, or None for the tokenizer's own.
            id_of: gives the id of a token, None for one that the tokenizer lacks.
            where: for messages.

        Raises:
            ConfigError: the tokenizer has no such token.
        """
        if token is None:
            if self.eos is None:
                raise ConfigError(
                    "the tokenizer has no end-of-document token",
                    where=where,
                    found="no eos_token",
                    remedy="set tokenizer.end_of_document to the token that ends its documents, or eos_token "
                    "in its tokenizer_config.json",
                )
            return self.eos
        if isinstance(token, int):
            if not 0 <= token < self.vocab_size:
                raise ConfigError(
                    "the id of the end-of-document token lies outside the vocabulary",
                    where=f"tokenizer.end_of_document, {where}",
                    found=token,
                    expected=f"0 to {self.vocab_size - 1}",
                )
            return token
        found = id_of(token)
        if found is None:
            raise ConfigError(
                "the tokenizer lacks the end-of-document token",
                where=f"tokenizer.end_of_document, {where}",
                found=repr(token),
                expected="a token of its vocabulary, written as there, or an id",
            )
        return found


def ends_of_documents(tokenizer: Tokenizer) -> str:
    """Say in words which tokens begin and end a document."""
    begins = "their text" if tokenizer.bos_id is None else shown(tokenizer, tokenizer.bos_id)
    return f"documents begin with {begins} and end with {shown(tokenizer, tokenizer.eod_id)}"


def shown(tokenizer: TokenNames, token_id: int) -> str:
    """Write a token as the vocabulary does, and its id."""
    return f"{tokenizer.id_to_piece(token_id)!r} (id {token_id})"


def first_tokens(index: TokenIndex, tokenizer: Tokenizer) -> str:
    """Write the first tokens of the first document, one by one and as text."""
    ids = index.read(0, 0, min(FIRST_TOKENS, index.document_length(0))).tolist()
    pieces = " ".join(tokenizer.id_to_piece(token_id) for token_id in ids)
    return f"{pieces!r}, as text {tokenizer.decode(ids)!r}"
