"""What descriptions share: lines of facts, and the tokenizer of a hash."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distill_pretrain.errors import DistillPretrainError
from distill_pretrain.jobs.console import say

if TYPE_CHECKING:
    from distill_pretrain.corpus.token_names import TokenNames


def fact(name: str, value: object) -> None:
    """Write one indented line of the description."""
    say(f"  {name:<22}{value}")


def find_tokenizer(places: list[Path], sha256: str | None) -> TokenNames | None:
    """Open the tokenizer of that hash, from the first of some folders with a tokens.json that names it."""
    from distill_pretrain.corpus.token_names import recorded_token_names
    from distill_pretrain.corpus.tokens_record import TokensRecord

    for place in places:
        if not (place / "tokens.json").is_file():
            continue
        try:
            folder = TokensRecord.load(place)
            if sha256 in folder.tokenizer_digests:
                return recorded_token_names(place, folder)
        except DistillPretrainError:
            continue
    return None


def short(value: object) -> str:
    """Cut a long hash to twelve digits; other values stay as they are."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} {short(v)}" for k, v in value.items()) + "}"
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text
