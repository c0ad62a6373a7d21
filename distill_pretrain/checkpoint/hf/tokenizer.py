"""A tokenizer beside exported weights: Hugging Face files are copied, a sentencepiece model becomes tokenizer.json.

The sentencepiece model file is read as what it is, a protocol buffer (sentencepiece_model.proto); only the fields
below are needed, so no protobuf package is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from distill_pretrain.errors import CheckpointError

_COPIED = (
    "added_tokens.json",
    "chat_template*",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.*",
)
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "\u2581"


def tokenizer_folder(source: Path, folder: Path, family: str) -> Path:
    """Return where in an export a tokenizer must be for transformers' AutoTokenizer to load it as it is.

    Beside a config.json of qwen2 it makes a Qwen2Tokenizer of any vocabulary, with other ids for the same text.
    """
    if family != "qwen2":
        return folder
    try:
        settings = json.loads((source / "tokenizer_config.json").read_bytes())
        its_own = str(settings["tokenizer_class"]).startswith("Qwen2Tokenizer")
    except (OSError, ValueError, KeyError, TypeError):
        its_own = False
    return folder if its_own else folder / "tokenizer"


def write_tokenizer(source: Path, folder: Path, *, max_positions: int) -> None:
    """Put a tokenizer that transformers loads into a folder.

    Args:
        source: folder of a Hugging Face tokenizer, or a sentencepiece model file.
        folder: of the export.
        max_positions: longest sequence of the model.

    Raises:
        CheckpointError: there is none, or a sentencepiece model that tokenizer.json cannot represent.
    """
    if source.is_file():
        _write_json(folder / "tokenizer.json", _converted(source))
        _write_json(folder / "tokenizer_config.json", _settings(source, max_positions))
        return
    names = [p.name for p in source.iterdir() if p.is_file()] if source.is_dir() else []
    copied = [name for name in names if any(fnmatch(name, pattern) for pattern in _COPIED)]
    if not copied:
        raise CheckpointError(
            "no tokenizer found",
            where=source,
            expected="a folder with tokenizer.json or its like, or a sentencepiece model file",
            remedy="correct --tokenizer",
        )
    for name in copied:
        shutil.copyfile(source / name, folder / name)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _settings(source: Path, max_positions: int) -> dict[str, Any]:
    """tokenizer_config.json; nothing is added to a text, as in training."""
    processor = _processor(source)
    ids = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unk": processor.unk_id()}
    special = {
        f"{kind}_token": processor.id_to_piece(number)
        for kind, number in ids.items()
        if number >= 0
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        **special,
    }


def _processor(source: Path) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=source.read_bytes())
    except RuntimeError:
        raise CheckpointError("not a sentencepiece model", where=source) from None


def _converted(source: Path) -> dict[str, Any]:
    """tokenizer.json of a sentencepiece model."""
    processor = _processor(source)
    model = _message(source.read_bytes())
    trainer, normalizer = (_message(model.get(field, [b""])[0]) for field in (2, 3))
    kind = trainer.get(3, [_UNIGRAM])[0]
    _require_convertible(source, kind, trainer, normalizer)
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    scores = [processor.get_score(i) for i in range(len(pieces))]
    kinds = [_message(raw).get(3, [_NORMAL])[0] for raw in model[1]]
    number = processor.unk_id()
    unknown = {"unk_id": number} if kind == _UNIGRAM else {"unk_token": pieces[number]}
    has_prefix = bool(normalizer.get(3, [1])[0])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kinds[number] in (_UNKNOWN, _CONTROL),
            }
            for number, piece in enumerate(pieces)
            if kinds[number] in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
        "normalizer": _normalizer(has_prefix),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": _decoder(has_prefix),
        "model": {
            **(_unigram(pieces, scores) if kind == _UNIGRAM else _bpe(pieces, scores, kinds)),
            **unknown,
            "byte_fallback": bool(trainer.get(35, [0])[0]),
        },
    }


def _require_convertible(
    source: Path, kind: int, trainer: dict[int, list[Any]], normalizer: dict[int, list[Any]]
) -> None:
    problems = []
    if kind not in (_UNIGRAM, _BPE):
        problems.append("model_type is neither unigram nor bpe")
    if normalizer.get(2, [b""])[0]:
        name = normalizer.get(1, [b""])[0].decode()
        problems.append(f"normalization rule {name or 'of its own'}, not identity")
    if normalizer.get(4, [1])[0]:
        problems.append("remove_extra_whitespaces is set")
    if not normalizer.get(5, [1])[0]:
        problems.append("escape_whitespaces is not set")
    if trainer.get(24, [0])[0]:
        problems.append("treat_whitespace_as_suffix is set")
    if problems:
        raise CheckpointError(
            "this sentencepiece model cannot be written as tokenizer.json",
            where=source,
            found=", ".join(problems),
            expected="what `distill-pretrain tokenize` trains",
            remedy="name a folder with the same tokenizer in Hugging Face's format, or leave the tokenizer out",
        )


def _normalizer(has_prefix: bool) -> dict[str, Any]:
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if not has_prefix:
        return spaces
    return {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, spaces]}


def _decoder(has_prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if has_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _unigram(pieces: list[str], scores: list[float]) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "vocab": [[piece, score] for piece, score in zip(pieces, scores, strict=True)],
    }


def _bpe(pieces: list[str], scores: list[float], kinds: list[int]) -> dict[str, Any]:
    """Merges in the order of the score of what they make, as sentencepiece applies them."""
    numbers = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    for number, piece in enumerate(pieces):
        for cut in range(1, len(piece) if kinds[number] == _NORMAL else 0):
            left, right = piece[:cut], piece[cut:]
            if left in numbers and right in numbers:
                merges.append((-scores[number], number, numbers[left], numbers[right], left, right))
    merges.sort()
    return {
        "type": "BPE",
        "dropout": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "ignore_merges": False,
        "vocab": numbers,
        "merges": [[left, right] for *_, left, right in merges],
    }


def _message(data: bytes) -> dict[int, list[Any]]:
    """The fields of a protocol buffer by number: numbers, and bytes of strings and messages."""
    fields: dict[int, list[Any]] = {}
    for number, value in _fields(data):
        fields.setdefault(number, []).append(value)
    return fields


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire = key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire == 2:
            size, position = _varint(data, position)
        else:
            size = {1: 8, 5: 4}[wire]
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        shift += 7
        if byte < 0x80:
            return value, position
