"""Tokenizers: sentencepiece models and Hugging Face folders."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from distill_pretrain.corpus.loss_marks import Offsets, without_offsets
from distill_pretrain.corpus.special_tokens import FoundTokens
from distill_pretrain.errors import ConfigError, MissingDependency

if TYPE_CHECKING:
    from distill_pretrain.corpus.config import BosMode

HF_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


class Tokenizer(Protocol):
    """Turns text into token ids, and back.

    Attributes:
        kind: "sentencepiece" or "hf".
        vocab_size: V; every id is below it.
        bos_id: token that begins a document; None where documents begin with their text.
        eod_id: token that ends a document.
        sha256: of the files that define it.
        semantic_sha256: of what decides the ids of a text; None where that cannot be told from the rest.
    """

    kind: str
    vocab_size: int
    bos_id: int | None
    eod_id: int
    sha256: str

    @property
    def semantic_sha256(self) -> str | None:
        """See above."""
        ...

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, with nothing added."""
        ...

    def encode_with_offsets(self, texts: list[str]) -> list[tuple[list[int], Offsets]]:
        """The same ids of each text, and the characters that each token stands for.

        Raises:
            ConfigError: the tokenizer does not tell.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids."""
        ...

    def id_to_piece(self, token_id: int) -> str:
        """Return how the tokenizer writes one token."""
        ...

    def save(self, folder: Path) -> str:
        """Copies the tokenizer's files into a folder; returns the name it has there."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece model; documents end with its `</s>`, unless told otherwise."""

    kind = "sentencepiece"

    def __init__(
        self,
        model: bytes,
        *,
        where: object,
        bos: BosMode = "never",
        end_of_document: str | int | None = None,
    ) -> None:
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ConfigError("not a sentencepiece model", where=where) from None
        self._model = model
        self.vocab_size = int(self._processor.vocab_size())
        self.sha256 = hashlib.sha256(model).hexdigest()
        found = FoundTokens(
            bos=_id_or_none(self._processor.bos_id()),
            begins_with_bos=False,
            eos=_id_or_none(self._processor.eos_id()),
            vocab_size=self.vocab_size,
        )
        self.bos_id = found.begin(bos, where=where)
        self.eod_id = found.end(end_of_document, self._id_of, where=where)

    def _id_of(self, piece: str) -> int | None:
        # Of a piece that it lacks the model gives the id of <unk>.
        found = int(self._processor.piece_to_id(piece))
        return found if self.id_to_piece(found) == piece else None

    @property
    def semantic_sha256(self) -> str | None:
        """None: a sentencepiece model is one file, which nobody writes again."""
        return None

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return [list(ids) for ids in self._processor.encode(texts, num_threads=1)]

    def encode_with_offsets(self, texts: list[str]) -> list[tuple[list[int], Offsets]]:
        """See `Tokenizer`; a character in several bytes belongs to the last of them."""
        return [self._with_offsets(text) for text in texts]

    def _with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        try:
            proto = self._processor.encode(text, return_type="proto")
        except TypeError:  # before sentencepiece 0.2.2
            of_old: Any = self._processor
            proto = of_old.encode(text, out_type="immutable_proto")
        # Begin and end are bytes in some versions and characters in others; surfaces are the text itself.
        surfaces = [piece.surface for piece in proto.pieces]
        if "".join(surfaces) != text:
            raise without_offsets("this sentencepiece model", "it leaves characters out")
        stops = np.cumsum([len(surface) for surface in surfaces], dtype=np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), stops])[:-1]
        return [piece.id for piece in proto.pieces], np.stack((starts, stops), axis=1)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids."""
        return str(self._processor.decode([int(token_id) for token_id in ids]))

    def id_to_piece(self, token_id: int) -> str:
        """Return the piece, with U+2581 for a space."""
        return str(self._processor.id_to_piece(int(token_id)))

    def save(self, folder: Path) -> str:
        """Writes tokenizer.model."""
        (folder / "tokenizer.model").write_bytes(self._model)
        return "tokenizer.model"


class HfTokenizer:
    """A Hugging Face tokenizer in a local folder; documents end with its eos token, unless told otherwise."""

    kind = "hf"

    def __init__(
        self, folder: Path, *, bos: BosMode = "never", end_of_document: str | int | None = None
    ) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise MissingDependency(
                "transformers", extra="hf", needed_for="Hugging Face tokenizers"
            ) from None
        try:
            # Without an answer to this, transformers would ask on stdin whether to run the folder's code.
            tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises nearly anything here
            raise ConfigError(
                "tokenizer cannot be loaded",
                where=folder,
                found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                expected="a folder with a Hugging Face tokenizer, such as tokenizer.json",
            ) from error
        # Text that happens to spell a special token stays text.
        tokenizer.split_special_tokens = True
        # Documents may be of any length; transformers warns of those that no model of its could take.
        tokenizer.model_max_length = 10**30
        self._tokenizer = tokenizer
        self._folder = folder
        self.vocab_size = len(tokenizer)
        found = FoundTokens(
            bos=_id_or_none(tokenizer.bos_token_id),
            begins_with_bos=self._begins_with_bos(),
            eos=_id_or_none(tokenizer.eos_token_id),
            vocab_size=self.vocab_size,
        )
        self._own_eos = found.eos
        self.bos_id = found.begin(bos, where=folder)
        self.eod_id = found.end(end_of_document, tokenizer.get_vocab().get, where=folder)
        self.sha256 = sha256_of_hf_folder(folder)

    @property
    def semantic_sha256(self) -> str | None:
        """Fingerprint of the loaded tokenizer: model, normaliser, pre-tokenizer, added words, the id of its eos token.

        Left out is what changes no id here, where nothing is added to a text and special tokens in it stay text:
        chat template, lengths, padding, other special tokens, post-processor, decoder.
        """
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        state = json.loads(backend.to_str())
        added = [token for token in state.get("added_tokens") or [] if not token["special"]]
        deciding = {
            "added": sorted(added, key=lambda token: int(token["id"])),
            # Its own, whichever token ends the documents of a corpus.
            "eod_id": self._own_eos,
            **{part: state.get(part) for part in ("model", "normalizer", "pre_tokenizer")},
        }
        text = json.dumps(_without_defaults(deciding), sort_keys=True)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    def _begins_with_bos(self) -> bool:
        """Whether the tokenizer by itself puts its BOS token before a text."""
        bos = self._tokenizer.bos_token_id
        if bos is None:
            return False
        first = [
            list(self._tokenizer("a", add_special_tokens=special)["input_ids"])[:1]
            for special in (True, False)
        ]
        return first[0] == [bos] != first[1]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens."""
        if not texts:  # transformers fails on none
            return []
        if self._plain is not None:
            encodings = self._plain.encode_batch_fast(texts, add_special_tokens=False)
            return [one.ids for one in encodings]
        encoded = self._tokenizer(
            texts, add_special_tokens=False, verbose=False, split_special_tokens=True
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def encode_with_offsets(self, texts: list[str]) -> list[tuple[list[int], Offsets]]:
        """See `Tokenizer`; all tokens of a character in several bytes have it."""
        encodings = self._whole_offsets.encode_batch(texts, add_special_tokens=False)
        return [(one.ids, np.array(one.offsets, np.int64).reshape(-1, 2)) for one in encodings]

    @cached_property
    def _plain(self) -> Any:
        """The tokenizer below transformers, which takes special tokens in a text as text; None if it is a slow one."""
        backend = copy.deepcopy(getattr(self._tokenizer, "backend_tokenizer", None))
        if backend is not None:
            backend.encode_special_tokens = True  # a copy forgets it
            backend.no_truncation()
            backend.no_padding()
        return backend

    @cached_property
    def _whole_offsets(self) -> Any:
        """The same, but that a space at the front of a token belongs to its characters."""
        backend = copy.deepcopy(self._plain)
        if backend is None:
            raise without_offsets("a slow tokenizer", f"{type(self._tokenizer).__name__}")
        from tokenizers import processors

        # It adds special tokens, which are not wanted here, and cuts spaces from offsets.
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        backend.encode_special_tokens = True
        return backend

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids."""
        plain = [int(token_id) for token_id in ids]
        return str(self._tokenizer.decode(plain, clean_up_tokenization_spaces=False))

    def id_to_piece(self, token_id: int) -> str:
        """Return the token as the vocabulary writes it."""
        return str(self._tokenizer.convert_ids_to_tokens(int(token_id)))

    def save(self, folder: Path) -> str:
        """Copies the defining files into tokenizer/."""
        target = folder / "tokenizer"
        target.mkdir()
        for name in (*HF_FILES, "config.json"):
            if (self._folder / name).is_file():
                shutil.copyfile(self._folder / name, target / name)
        return "tokenizer"


def load_tokenizer(
    kind: str, path: Path, *, bos: BosMode = "never", end_of_document: str | int | None = None
) -> Tokenizer:
    """Loads a tokenizer from a sentencepiece model file or a Hugging Face folder.

    Args:
        kind: "sentencepiece" or "hf".
        path: the file or folder.
        bos: whether documents begin with its BOS token, see `TokenizerConfig`.
        end_of_document: token or id that ends documents; None for its own.

    Raises:
        ConfigError: nothing usable at the path, or it lacks a token that is asked for.
        MissingDependency: the package that reads it is not installed.
    """
    if kind == "hf":
        if not path.is_dir():
            raise ConfigError(
                "tokenizer folder not found",
                where=path,
                expected="a folder with a Hugging Face tokenizer",
                remedy="correct tokenizer.path",
            )
        return HfTokenizer(path, bos=bos, end_of_document=end_of_document)
    if not path.is_file():
        raise ConfigError(
            "tokenizer file not found",
            where=path,
            expected="a sentencepiece .model file",
            remedy="correct tokenizer.path, or set tokenizer.kind=hf for a folder",
        )
    return SentencePieceTokenizer(
        path.read_bytes(), where=path, bos=bos, end_of_document=end_of_document
    )


def _without_defaults(value: Any) -> Any:
    """JSON without what is off or empty, and merges as text: libraries of other versions write these differently."""
    if isinstance(value, dict):
        kept = {key: _without_defaults(inner) for key, inner in value.items()}
        if isinstance(kept.get("merges"), list):
            kept["merges"] = [m if isinstance(m, str) else " ".join(m) for m in kept["merges"]]
        off: tuple[Any, ...] = (None, "", [], {})
        return {
            key: inner for key, inner in kept.items() if inner is not False and inner not in off
        }
    if isinstance(value, list):
        return [_without_defaults(inner) for inner in value]
    return value


def _id_or_none(token_id: int | None) -> int | None:
    """Sentencepiece says -1 of a token that it lacks."""
    return None if token_id is None or token_id < 0 else int(token_id)


def sha256_of_hf_folder(folder: Path) -> str:
    """Compute the fingerprint of the files that define a Hugging Face tokenizer."""
    digest = hashlib.sha256()
    for name in HF_FILES:
        if (folder / name).is_file():
            content = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()
