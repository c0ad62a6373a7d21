"""What a corpus leaves out of the loss: from fields of JSONL to labels, and the file in between."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from distill_pretrain.contracts import IGNORED_LABEL
from distill_pretrain.corpus import build
from distill_pretrain.corpus.config import CorpusConfig, TokenizerConfig
from distill_pretrain.corpus.loss_weights import SUFFIX
from distill_pretrain.corpus.sequence_plan import SequencePlan
from distill_pretrain.corpus.token_index import TokenIndex
from distill_pretrain.corpus.token_writer import TokenIndexWriter
from distill_pretrain.corpus.tokens_record import TokensRecord
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import open_sequences
from distill_pretrain.errors import CorpusError, TokenDataError
from tests.corpus.conftest import text_of

AWKWARD = "  naïve 日本語 🎉🎉 e\u0301\t\n\n x  =\x0b 1 "


def hf_folder(folder: Path) -> Path:
    """A byte-level BPE tokenizer whose own offsets leave out the space in front of a word, as GPT-2's do."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=byte_level.alphabet(), special_tokens=["<|end|>"]
    )
    tokenizer.train_from_iterator([text_of(n) for n in range(20)], trainer)
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    whole.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizers_of(tmp_path_factory) -> dict[str, TokenizerConfig]:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text("".join(text_of(n) for n in range(20)))
    corpus = CorpusConfig(
        paths=[folder / "text.txt"], output_dir=folder / "sp", held_out_fraction=0
    )
    build.tokenize_corpus(corpus, TokenizerConfig(vocab_size=330))
    return {
        "sentencepiece": TokenizerConfig(path=folder / "sp/tokenizer.model"),
        "hf": TokenizerConfig(kind="hf", path=hf_folder(folder / "hf"), bos="never"),
    }


def tokenized(folder: Path, lines: list[dict], tokenizer: TokenizerConfig, **settings) -> Path:
    """The prefix of the tokens of some JSON lines."""
    folder.mkdir(exist_ok=True)
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    name = settings.pop("name", "lines.jsonl")
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    corpus = CorpusConfig(
        **{
            "paths": [folder / name],
            "output_dir": folder / "out",
            "held_out_fraction": 0,
            "workers": 1,
            "masked_key": "masked",
            "weight_key": "weight",
            **settings,
        }
    )
    build.tokenize_corpus(corpus, tokenizer)
    return folder / "out/train"


def pieces_in_bytes(kind: str, folder: Path, ids: list[int]) -> list[int]:
    """UTF-8 bytes of each token, by how the vocabulary writes it: no look at offsets."""
    tokenizer = build.load_tokenizer_of(folder)
    pieces = [tokenizer.id_to_piece(token_id) for token_id in ids]
    if kind == "hf":  # one character of ByteLevel's alphabet a byte
        return [len(piece) for piece in pieces]
    return [
        1
        if len(piece) == 6 and piece.startswith("<0x")
        else len(piece.replace("\u2581", " ").encode())
        for piece in pieces
    ]


def spans_between_tokens(kind, folder, ids, text, draw) -> list[list[int]]:
    """Some spans of characters whose borders are borders of tokens."""
    ends = np.cumsum([0, *pieces_in_bytes(kind, folder, ids)]).tolist()
    assert ends[-1] == len(text.encode())
    in_bytes = np.cumsum([0, *(len(character.encode()) for character in text)]).tolist()
    borders = sorted(set(ends) & set(in_bytes))
    spans = []
    for _ in range(draw.randrange(1, 4)):
        start, stop = sorted(draw.sample(borders, 2))
        spans.append([in_bytes.index(start), in_bytes.index(stop)])
    return spans


@pytest.mark.parametrize("kind", ["sentencepiece", "hf"])
def test_tokens_of_spans_and_documents_are_left_out_and_no_others(kind, tokenizers_of, tmp_path):
    draw = random.Random(1)
    texts = [text_of(n, lines=3) + AWKWARD * (n % 2) for n in range(24)]
    tokenizer = tokenizers_of[kind]
    plain = tokenized(
        tmp_path / "plain",
        [{"text": text} for text in texts],
        tokenizer,
        masked_key=None,
        weight_key=None,
    )
    index = TokenIndex.open(plain)
    assert index.loss is None
    lines, expected = [], []
    for number, text in enumerate(texts):
        ids = index.read(number, 0, int(index.document_lengths[number]) - 1).tolist()
        line, weights = {"text": text}, np.ones(len(ids) + 1)
        if number % 4 == 0:
            line["masked"] = [True, False, None][number // 4 % 3]
            weights *= not line["masked"]
        if number % 4 in (1, 2):
            spans = spans_between_tokens(kind, plain.parent, ids, text, draw)
            line["masked"] = spans
            lengths = pieces_in_bytes(kind, plain.parent, ids)
            stops = np.cumsum(lengths)
            for start, stop in spans:
                first, last = (len(text[:place].encode()) for place in (start, stop))
                weights[:-1][(stops - lengths >= first) & (stops <= last)] = 0
        if number % 3 == 2:
            line["weight"] = draw.choice([0, 0.5, 2, 3.25])
            weights *= line["weight"]
        lines.append(line)
        expected.append(weights)
    prefix = tokenized(tmp_path / "marked", lines, tokenizer)
    marked = TokenIndex.open(prefix)
    marked.check_loss()
    assert prefix.with_suffix(".bin").read_bytes() == plain.with_suffix(".bin").read_bytes()
    assert marked.loss is not None and marked.loss.is_weighted
    found = [
        marked.loss_weights(number, 0, int(length))
        for number, length in enumerate(marked.document_lengths)
    ]
    for number, (some, others) in enumerate(zip(found, expected, strict=True)):
        assert some.tolist() == others.tolist(), number
    assert 0.2 < np.mean([weight == 0 for some in expected for weight in some]) < 0.8
    assert marked.loss.num_masked() == sum(int((some == 0).sum()) for some in expected)
    # Wrapped otherwise, by two processes: the same.
    again = tokenized(tmp_path / "again", lines, tokenizer, name="lines.jsonl.gz", workers=2)
    assert again.with_suffix(SUFFIX).read_bytes() == prefix.with_suffix(SUFFIX).read_bytes()


def test_the_bytes_of_a_character_go_together(tokenizers_of, tmp_path):
    """The first bytes of one that the vocabulary lacks stand for no character of their own."""
    lines = [{"text": "a日本", "masked": [[0, 1]]}, {"text": "a日本", "masked": [[1, 2]]}]
    tokenizer = tokenizers_of["sentencepiece"]
    index = TokenIndex.open(tokenized(tmp_path, lines, tokenizer, weight_key=None))
    found = [index.loss_weights(number, 0, 8).tolist() for number in range(2)]
    assert found == [[0, *[1] * 7], [1, 0, 0, 0, *[1] * 4]]


def test_a_corpus_of_weights_alone(tmp_path):
    with TokenIndexWriter(tmp_path / "train", 100) as writer:
        writer.add_document([1, 2, 3])
        writer.add_document([4, 5], weight=0.5)
    index = TokenIndex.open(tmp_path / "train")
    assert [index.loss_weights(n, 0, 2).tolist() for n in range(2)] == [[1, 1], [0.5, 0.5]]
    assert index.loss.num_masked() == 0 and index.loss.is_weighted


def test_ids_do_not_depend_on_whether_offsets_are_asked_for(tokenizers_of):
    texts = [AWKWARD, text_of(3), "<|end|> </s> <unk> a", "x"]
    for config in tokenizers_of.values():
        tokenizer = build.load_tokenizer(config.kind, config.path)
        encoded = tokenizer.encode_with_offsets(texts)
        assert [ids for ids, _ in encoded] == tokenizer.encode(texts)
        for text, (_, offsets) in zip(texts, encoded, strict=True):
            assert offsets[0, 0] == 0 and offsets[-1, 1] == len(text)


FINE = {"text": "the student and the teacher", "masked": [[0, 3]]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"masked": [[3, 28]]},
            r"a span lies outside its text; .*:2; found: \[3, 28\); expected: .*<= 27",
        ),
        ({"masked": [[-1, 3]]}, r"outside|no characters"),
        ({"masked": [[4, 4]]}, "a span has no characters"),
        (
            {"masked": [[0, 5]]},
            r"in the middle of a token; where: .*lines\.jsonl:2; found: \[0, 5\), and a token of characters \[3, 11\): "
            r"' student'; expected: borders between tokens; remedy: move the border from 5 to 3 or 11",
        ),
        ({"masked": [[0, 3], [5, 27]]}, "move the border from 5 to 3 or 11"),
        ({"masked": [[4, 11]]}, "move the border from 4 to 3 or 11"),
        ({"masked": [[0, 3.0]]}, r"holds what is no span; .*\[0, 3\.0\]"),
        ({"masked": [[False, True]]}, "holds what is no span"),
        ({"masked": "all"}, r"does not say what the loss leaves out; .*'all'"),
        ({"weight": -1}, r"'weight' is no weight; .*:2; found: -1"),
        ({"weight": True}, "is no weight"),
        ({"weight": float("nan")}, "is no weight"),
        ({"weight": 1e7}, "from 0 to 1e\\+06"),
    ],
)
def test_a_mark_that_makes_no_sense_is_named_and_nothing_is_written(
    line, message, tokenizers_of, tmp_path
):
    with pytest.raises(CorpusError, match=message):
        tokenized(tmp_path, [FINE, {**FINE, **line}], tokenizers_of["hf"])
    assert not (tmp_path / "out").exists()


def test_a_key_that_no_line_has_and_a_corpus_left_out_whole_are_errors(tokenizers_of, tmp_path):
    tokenizer = tokenizers_of["hf"]
    with pytest.raises(CorpusError, match=r"no document has the key 'weight'; where: corpus\.wei"):
        tokenized(tmp_path, [FINE], tokenizer)
    with pytest.raises(CorpusError, match="the loss leaves out all of the train split"):
        tokenized(tmp_path, [{"text": "a", "masked": True}], tokenizer, weight_key=None)
    parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"read from JSON lines alone; where: .*a\.parquet"):
        tokenized(tmp_path, [FINE], tokenizer, paths=[tmp_path / "a.parquet"])


def test_another_key_is_another_recipe(tokenizers_of, tmp_path):
    lines = [{**FINE, "weight": 2}, {**FINE, "also": True, "masked": False}]
    prefix = tokenized(tmp_path, lines, tokenizers_of["hf"])
    tokenized(tmp_path, lines, tokenizers_of["hf"])  # done already
    with pytest.raises(CorpusError, match=r"another value of corpus\.masked_key"):
        tokenized(tmp_path, lines, tokenizers_of["hf"], masked_key="also")
    damage(prefix.with_suffix(SUFFIX), -1)
    with pytest.raises(TokenDataError, match="the loss weights are damaged"):
        tokenized(tmp_path, lines, tokenizers_of["hf"])


def damage(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def marked_corpus(folder: Path, seed: int = 0) -> tuple[Path, list[np.ndarray], list[np.ndarray]]:
    """A corpus whose first documents are whole in the loss: its prefix, its documents and their weights."""
    draw = np.random.default_rng(seed)
    documents, weights = [], []
    with TokenIndexWriter(folder / "train", 1000) as writer:
        for number in range(30):
            length = int(draw.integers(1, 40))
            document = draw.integers(1, 1000, length)
            masked = draw.random(length) < 0.4 if number > 5 else None
            weight = float(draw.choice([1.0, 0.0, 0.25])) if number > 5 else 1.0
            writer.add_document(document, masked=masked, weight=weight)
            documents.append(document)
            kept = np.ones(length) if masked is None else ~masked
            weights.append((kept * weight).astype(np.float32))
    return folder / "train", documents, weights


@pytest.mark.parametrize("seed", range(4))
def test_labels_and_weights_are_those_of_the_next_token(seed, tmp_path):
    prefix, documents, weights = marked_corpus(tmp_path, seed)
    index = TokenIndex.open(prefix)
    plan = SequencePlan(index, seq_len=16, seed=seed)
    numbers = np.arange(plan.num_sequences)
    tokens, labels = plan.read(numbers)
    same, everything = plan.unmasked.read(numbers)
    order = plan._order
    stream = np.concatenate([documents[d] for d in order])
    weight = np.concatenate([weights[d] for d in order])[1:]
    assert np.array_equal(tokens, same)
    assert everything.reshape(-1)[: len(stream) - 1].tolist() == stream[1:].tolist()
    wanted = np.where(weight > 0, stream[1:], IGNORED_LABEL)
    assert labels.reshape(-1)[: len(stream) - 1].tolist() == wanted.tolist()
    assert 0.3 < np.mean(wanted == IGNORED_LABEL) < 0.9
    found = plan.loss_weights(numbers).reshape(-1)
    assert found[: len(weight)].tolist() == weight.tolist()
    chosen = [3, 0, 3]
    assert np.array_equal(plan.loss_weights(chosen), plan.loss_weights(numbers)[chosen])
    # What is left out is part of no plan: a cache serves any of it.
    prefix.with_suffix(SUFFIX).unlink()
    assert SequencePlan(TokenIndex.open(prefix), seq_len=16, seed=seed).plan_id == plan.plan_id


def test_the_file_is_what_its_specification_says(tmp_path):
    with TokenIndexWriter(tmp_path / "train", 100) as writer:
        writer.add_document([1, 2, 3])
        writer.add_document(range(9), masked=np.arange(9) % 2 == 0, weight=0.5)
        writer.add_document([7, 7], weight=0)
    content = (tmp_path / "train.loss").read_bytes()
    header = struct.unpack_from("<8sIIQQQ32s32s", content)
    assert header[:6] == (b"DPLOSS\0\0", 1, 0, 3, 14, 3)
    assert header[6] == hashlib.sha256((tmp_path / "train.bin").read_bytes()).digest()
    body = content[128:]
    assert header[7] == hashlib.sha256(body).digest()
    bits = [0, 0, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 1, 1]
    expected = bytes([sum(bit << n for n, bit in enumerate(bits[i : i + 8])) for i in (0, 8)])
    assert body == expected + bytes(6) + struct.pack("<3f", 1.0, 0.5, 1.0)


def test_a_corpus_without_marks_has_no_file(tmp_path):
    with TokenIndexWriter(tmp_path / "train", 100) as writer:
        writer.add_document([1, 2, 3], masked=np.zeros(3, bool), weight=1.0)
    assert not (tmp_path / "train.loss").exists()
    assert "loss_sha256" not in TokenIndex.open(tmp_path / "train").record


@pytest.mark.parametrize(
    ("masked", "weight"), [([True], 1.0), ([0, 1], 1.0), (None, -1.0), (None, float("nan"))]
)
def test_a_writer_refuses_marks_that_do_not_fit(masked, weight, tmp_path):
    with (
        pytest.raises(TokenDataError, match="part in the loss is none"),
        TokenIndexWriter(tmp_path / "train", 100) as writer,
    ):
        writer.add_document([1, 2], masked=masked, weight=weight)
    assert not list(tmp_path.iterdir())


def test_damage_and_strangers_are_found(tmp_path):
    prefix, *_ = marked_corpus(tmp_path)
    path = prefix.with_suffix(SUFFIX)
    sound = path.read_bytes()
    config = DataConfig(tokens=prefix, seq_len=16, vocab_size=1000)

    def refused(message: str) -> None:
        with pytest.raises(TokenDataError, match=message):
            open_sequences(config)
        path.write_bytes(sound)

    open_sequences(config)
    damage(path, 130)
    refused(r"the loss weights are damaged; where: .*train\.loss")
    damage(path, 0)
    refused("not a file of loss weights")
    damage(path, 8)
    refused("loss weights of another version; .*found: version 0; expected: version 1")
    path.write_bytes(sound[:-1])
    refused("the loss weights are cut off")
    damage(path, 16)
    refused("the loss weights belong to another corpus; .*30 documents")
    # The same sizes, another text.
    other = tmp_path / "other"
    other.mkdir()
    marked_corpus(other)
    damage(other / "train.bin", 4)
    path.write_bytes((other / "train.loss").read_bytes())
    for suffix in (".bin", ".idx"):
        prefix.with_suffix(suffix).write_bytes((other / f"train{suffix}").read_bytes())
    refused("belong to another corpus; .*made for a .bin of sha256")


def test_a_file_that_was_left_behind_is_missed(tokenizers_of, tmp_path):
    lines = [{**FINE, "weight": 2}, {"text": "class value import", "weight": 3}] * 4
    prefix = tokenized(tmp_path, lines, tokenizers_of["hf"])
    config = DataConfig(tokens=prefix, seq_len=8)
    assert open_sequences(config).index.loss is not None
    recorded = TokensRecord.load(prefix.parent).corpora["train"]["loss_sha256"]
    assert recorded == TokenIndex.open(prefix).loss.sha256
    prefix.with_suffix(SUFFIX).unlink()
    with pytest.raises(TokenDataError, match=r"not what was written; .*train\.loss; found: no suc"):
        open_sequences(config)
