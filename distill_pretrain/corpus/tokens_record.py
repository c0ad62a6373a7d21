"""tokens.json: what a folder of tokenised corpora was made with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_pretrain.errors import ConfigError, TokenDataError
from distill_pretrain.files.atomic import canonical_json, publish_bytes

if TYPE_CHECKING:
    from distill_pretrain.corpus.token_index import TokenIndex

FILE_NAME = "tokens.json"
_VERSION = 1
_TOKENIZER_KEYS = {"kind": str, "sha256": str, "vocab_size": int, "file": str}


@dataclass(frozen=True, kw_only=True)
class TokensRecord:
    """The contents of tokens.json.

    Attributes:
        tokenizer: {kind, sha256, vocab_size, file}; `file` is relative to the folder, `sha256` is of the files.
            Since 2026-11 also `semantic_sha256`: of what decides the ids of a text, whatever else the files say;
            and `bos_id` of a corpus whose documents begin with that token.
        vocab_size: V, the real vocabulary.
        eod_id: id that ends every document.
        corpora: name ("train", "held_out") -> TokenFingerprint.as_dict().
        software: package -> version.
    """

    tokenizer: dict[str, Any]
    vocab_size: int
    eod_id: int
    corpora: dict[str, dict[str, Any]]
    software: dict[str, str]

    @property
    def tokenizer_digests(self) -> tuple[str, ...]:
        """Every hash that the tokenizer is known by; the first is the one that is written down."""
        semantic = self.tokenizer.get("semantic_sha256")
        files = str(self.tokenizer["sha256"])
        return (semantic, files) if isinstance(semantic, str) else (files,)

    @property
    def bos_id(self) -> int | None:
        """The id that begins every document; None where they begin with their text."""
        return self.tokenizer.get("bos_id")

    def check_loss(self, index: TokenIndex) -> None:
        """Raise TokenDataError where the PREFIX.loss that `tokenize` wrote for a corpus of the folder is not there."""
        recorded = self.corpora.get(index.prefix.name, {})
        found = None if index.loss is None else index.loss.sha256
        same_text = recorded.get("bin_sha256") == index.fingerprint.bin_sha256
        if same_text and recorded.get("loss_sha256") != found:
            raise TokenDataError(
                "what the loss leaves out of the corpus is not what was written",
                where=f"{index.prefix}.loss",
                found="no such file" if found is None else f"sha256 {found[:12]}",
                expected=f"sha256 {recorded.get('loss_sha256', 'none')[:12]}, as tokens.json records",
                remedy="copy .bin, .idx and .loss of the corpus again",
            )

    def save(self, folder: Path) -> None:
        """Publish FOLDER/tokens.json."""
        publish_bytes(
            Path(folder) / FILE_NAME, canonical_json({"version": _VERSION, **asdict(self)})
        )

    @classmethod
    def load(cls, folder: Path) -> TokensRecord:
        """Read FOLDER/tokens.json.

        Raises:
            TokenDataError: missing, damaged, or of a later version.
        """
        path = Path(folder) / FILE_NAME
        try:
            fields = json.loads(path.read_bytes())
        except OSError as error:
            raise _unreadable(path, error.strerror or str(error)) from None
        except ValueError as error:
            raise _unreadable(path, f"no valid JSON ({error})") from None
        if not isinstance(fields, dict) or fields.pop("version", None) != _VERSION:
            raise _unreadable(path, f"not a version {_VERSION} record")
        problem = _problem(fields)
        if problem is not None:
            raise _unreadable(path, problem)
        return cls(**fields)

    @classmethod
    def beside(cls, prefix: Path) -> TokensRecord | None:
        """Read the record in the folder of a corpus prefix; None when that folder has none."""
        folder = Path(prefix).parent
        return cls.load(folder) if (folder / FILE_NAME).exists() else None


def document_end_of(documents: str, tokens: Path) -> int | None:
    """Return the token that keeps separate documents of a corpus apart; None where they are joined.

    Raises:
        ConfigError: nothing tells which token ends a document.
    """
    if documents == "joined":
        return None
    record = TokensRecord.beside(tokens)
    if record is None:
        raise ConfigError(
            "the token that ends a document is unknown",
            where="data.documents",
            found="separate",
            expected=f"tokens.json beside {tokens}",
            remedy="make the corpus with `distill-pretrain tokenize`, or set data.documents=joined",
        )
    return record.eod_id


def _problem(fields: dict[str, Any]) -> str | None:
    expected = {
        "tokenizer": dict,
        "vocab_size": int,
        "eod_id": int,
        "corpora": dict,
        "software": dict,
    }
    if set(fields) != set(expected):
        return f"fields {sorted(fields)}, expected {sorted(expected)}"
    for name, kind in expected.items():
        if not isinstance(fields[name], kind):
            return f"{name} is no {kind.__name__}"
    for name, kind in _TOKENIZER_KEYS.items():
        if not isinstance(fields["tokenizer"].get(name), kind):
            return f"tokenizer.{name} is missing or no {kind.__name__}"
    if not all(isinstance(corpus, dict) for corpus in fields["corpora"].values()):
        return "a corpus is no object"
    if not 0 <= fields["eod_id"] < fields["vocab_size"]:
        return f"eod_id {fields['eod_id']} outside the vocabulary of {fields['vocab_size']}"
    bos_id = fields["tokenizer"].get("bos_id", 0)
    if not isinstance(bos_id, int) or not 0 <= bos_id < fields["vocab_size"]:
        return f"tokenizer.bos_id {bos_id} outside the vocabulary of {fields['vocab_size']}"
    return None


def _unreadable(path: Path, found: str) -> TokenDataError:
    return TokenDataError(
        "the record of the tokenised corpus cannot be read",
        where=path,
        found=found,
        expected="the tokens.json that `distill-pretrain tokenize` writes",
        remedy="run `distill-pretrain tokenize` again",
    )
