from __future__ import annotations

import builtins
import inspect
import json
import logging
import random
import shutil
import textwrap

import pytest

from distill_pretrain.corpus import recorded_tokenizer, sources, tokenizers, training
from distill_pretrain.corpus.config import CorpusConfig, TokenizerConfig
from distill_pretrain.corpus.tokens_record import TokensRecord
from distill_pretrain.errors import ConfigError, CorpusError, MissingDependency, TokenizerMismatch

SOURCE = inspect.getsource(textwrap) + inspect.getsource(json)
AWKWARD = [
    "\tdef f(x):\n\t\treturn  x  \r\n",
    "  two  leading and trailing  ",
    "\n\n\n",
    " ",
    "\x0c\x0b\u00a0\u2028",
    "e\u0301 ﬁ 日本語 🎉 </s> <unk> <0x0A>",
]


def trained(tmp_path, **settings):
    (tmp_path / "a.txt").write_text(SOURCE)
    corpus = CorpusConfig(paths=[tmp_path / "a.txt"], output_dir=tmp_path / "out")
    config = TokenizerConfig(**{"vocab_size": 500, **settings})
    return training.train_tokenizer(corpus, config, sources.list_sources(corpus))


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_source_code_survives_a_trained_tokenizer(tmp_path, model_type):
    tokenizer = trained(tmp_path, model_type=model_type)
    texts = [SOURCE, *AWKWARD]
    encoded = tokenizer.encode(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert all(0 <= token < tokenizer.vocab_size for ids in encoded for token in ids)
    assert all(tokenizer.eod_id not in ids for ids in encoded)
    assert tokenizer.vocab_size == 500
    assert tokenizer.id_to_piece(tokenizer.eod_id) == "</s>"


def test_training_twice_gives_the_same_tokenizer(tmp_path):
    assert trained(tmp_path).sha256 == trained(tmp_path).sha256


def test_the_sample_is_bounded_and_spread_over_the_corpus(tmp_path):
    lines = [json.dumps({"text": f"{number:06d}"}) for number in range(20_000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("long line of text\n" * 20_000)
    corpus = CorpusConfig(paths=[tmp_path], output_dir=tmp_path / "out")
    listed = sources.list_sources(corpus)
    config = TokenizerConfig(training_bytes=300_000)
    sample = list(training._sample(corpus, config, listed))
    assert 100_000 < sum(len(text.encode()) for text in sample) <= 300_000
    assert sample == list(training._sample(corpus, config, listed))
    numbers = [int(text) for text in sample if text.isdigit()]
    assert numbers == sorted(numbers)
    assert numbers[-1] - numbers[0] > len(numbers)
    assert any("long" in text for text in sample)
    tiny = TokenizerConfig(training_bytes=1000)
    assert sum(len(text.encode()) for text in training._sample(corpus, tiny, listed)) <= 1000


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_one_line_longer_than_every_slice_of_the_sample_trains_a_tokenizer(tmp_path, name):
    text = "".join(random.Random(0).choices("abcdefgh ", k=1_000_000))
    is_jsonl = name.endswith("l")
    (tmp_path / name).write_text(json.dumps({"text": text}) if is_jsonl else text)
    corpus = CorpusConfig(paths=[tmp_path / name], output_dir=tmp_path / "out")
    config = TokenizerConfig(vocab_size=300, training_bytes=100_000)
    listed = sources.list_sources(corpus)
    sample = list(training._sample(corpus, config, listed))
    assert sum(len(piece) for piece in sample) == 100_000
    assert training.train_tokenizer(corpus, config, listed).vocab_size == 300


def test_what_sentencepiece_refuses_is_no_traceback(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    corpus = CorpusConfig(paths=[tmp_path / "a.jsonl"], output_dir=tmp_path / "out")
    with pytest.raises(ConfigError, match="cannot train a tokenizer on this corpus"):
        training.train_tokenizer(corpus, TokenizerConfig(), sources.list_sources(corpus))


@pytest.mark.parametrize("vocab_size", [64, 100_000])
def test_a_vocabulary_that_cannot_be_trained_is_refused(tmp_path, vocab_size):
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size; found: \d+: Vocabulary size"):
        trained(tmp_path, vocab_size=vocab_size)


def test_a_missing_or_foreign_tokenizer_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="tokenizer file not found"):
        tokenizers.load_tokenizer("sentencepiece", tmp_path / "x.model")
    (tmp_path / "x.model").write_text("no model")
    with pytest.raises(ConfigError, match="not a sentencepiece model"):
        tokenizers.load_tokenizer("sentencepiece", tmp_path / "x.model")
    with pytest.raises(ConfigError, match="tokenizer folder not found"):
        tokenizers.load_tokenizer("hf", tmp_path / "nowhere")


def record_of(tokenizer, file: str, **more) -> TokensRecord:
    made_by = {"kind": tokenizer.kind, "sha256": tokenizer.sha256, "file": file, **more}
    return TokensRecord(
        tokenizer={**made_by, "vocab_size": tokenizer.vocab_size},
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        corpora={},
        software={},
    )


def test_a_stored_tokenizer_of_another_hash_is_refused(tmp_path):
    tokenizer = trained(tmp_path)
    record = record_of(tokenizer, tokenizer.save(tmp_path))
    assert recorded_tokenizer.load_recorded_tokenizer(tmp_path, record).vocab_size == 500
    trained(tmp_path, vocab_size=480).save(tmp_path)
    with pytest.raises(TokenizerMismatch):
        recorded_tokenizer.load_recorded_tokenizer(tmp_path, record)


@pytest.fixture
def hf_folder(tmp_path):
    library = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    model = library.Tokenizer(library.models.BPE(byte_fallback=True))
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([SOURCE], trainer)
    folder = tmp_path / "hf"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")
    fast.save_pretrained(folder)
    return folder


def test_a_hugging_face_folder_encodes_and_is_copied_whole(tmp_path, hf_folder):
    tokenizer = tokenizers.load_tokenizer("hf", hf_folder)
    texts = [SOURCE, "a <eos> b", "\tx  y\n"]
    encoded = tokenizer.encode(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert all(tokenizer.eod_id not in ids for ids in encoded)
    name = tokenizer.save(tmp_path)
    copy = recorded_tokenizer.load_recorded_tokenizer(tmp_path, record_of(tokenizer, name))
    assert copy.encode(texts) == encoded
    assert recorded_tokenizer.tokenizer_sha256("hf", hf_folder) == tokenizer.sha256


def test_ids_are_those_of_transformers_whatever_lengths_the_folder_asks_for(hf_folder):
    transformers = pytest.importorskip("transformers")

    def cut_and_pad(values):
        values["truncation"] = {
            "direction": "Right",
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        values["padding"] = {
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<eos>",
        }

    edited(hf_folder, "tokenizer.json", cut_and_pad)
    texts = [SOURCE, "a <eos> b", "\tx  y\n"]
    whole = transformers.AutoTokenizer.from_pretrained(hf_folder)
    expected = whole(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    tokenizer = tokenizers.load_tokenizer("hf", hf_folder)
    assert tokenizer.encode(texts) == expected
    assert [ids for ids, _ in tokenizer.encode_with_offsets(texts)] == expected


@pytest.mark.parametrize("kind", ["hf", "sentencepiece"])
def test_no_texts_have_no_ids(tmp_path, request, kind):
    if kind == "hf":
        tokenizer = tokenizers.load_tokenizer("hf", request.getfixturevalue("hf_folder"))
    else:
        tokenizer = trained(tmp_path)
    assert tokenizer.encode([]) == []
    assert tokenizer.encode_with_offsets([]) == []


def test_a_document_longer_than_any_model_takes_is_no_warning(hf_folder, caplog):
    edited(hf_folder, "tokenizer_config.json", lambda values: values.update(model_max_length=16))
    logger = logging.getLogger("transformers")  # it does not propagate
    logger.addHandler(caplog.handler)
    try:
        (ids,) = tokenizers.load_tokenizer("hf", hf_folder).encode([SOURCE])
    finally:
        logger.removeHandler(caplog.handler)
    assert len(ids) > 16
    assert not caplog.records


def edited(folder, file: str, change) -> None:
    """Changes the JSON of a file, which is written with another indentation."""
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).write_text(json.dumps(values, indent=7))


def add_token(values: dict, *, special: bool) -> None:
    token = {"id": 400, "content": "return", "single_word": False, "lstrip": False}
    values["added_tokens"].append(
        {**token, "rstrip": False, "normalized": False, "special": special}
    )


SETTINGS, MODEL = "tokenizer_config.json", "tokenizer.json"
SAME_IDS = {
    "chat template": (SETTINGS, lambda v: v.update(chat_template="{{ messages }}")),
    "longest text": (SETTINGS, lambda v: v.update(model_max_length=77)),
    "indentation": (MODEL, lambda v: None),
    "merges as text": (
        MODEL,
        lambda v: v["model"].update(merges=[" ".join(m) for m in v["model"]["merges"]]),
    ),
    "padding": (MODEL, lambda v: v.update(padding=None, truncation=None)),
    "special token": (MODEL, lambda v: add_token(v, special=True)),
}
OTHER_IDS = {
    "a merge less": (MODEL, lambda v: v["model"]["merges"].pop()),
    "normaliser": (MODEL, lambda v: v.update(normalizer={"type": "NFC"})),
    "pre-tokenizer": (MODEL, lambda v: v["pre_tokenizer"].update(add_prefix_space=True)),
    "end of document": (SETTINGS, lambda v: v.update(eos_token="!")),
    "added word": (MODEL, lambda v: add_token(v, special=False)),
}


def test_a_tokenizer_is_known_by_the_ids_it_gives(tmp_path, hf_folder):
    made_by = tokenizers.load_tokenizer("hf", hf_folder)
    known = {"kind": "hf", "sha256": made_by.sha256, "vocab_size": 400}
    known["file"] = made_by.save(tmp_path)
    records = [
        TokensRecord(tokenizer=which, vocab_size=400, eod_id=0, corpora={}, software={})
        for which in ({**known, "semantic_sha256": made_by.semantic_sha256}, known)
    ]

    def is_same(folder) -> set[bool]:
        return {
            recorded_tokenizer.is_same_tokenizer(record, tmp_path, folder) for record in records
        }

    saved_again = tmp_path / "again"
    made_by._tokenizer.save_pretrained(saved_again)
    assert is_same(hf_folder) == is_same(saved_again) == {True}
    for cases, expected in ((SAME_IDS, True), (OTHER_IDS, False)):
        for name, (file, change) in cases.items():
            folder = shutil.copytree(hf_folder, tmp_path / name)
            edited(folder, file, change)
            assert is_same(folder) == {expected}, name
            same = tokenizers.load_tokenizer("hf", folder).encode([SOURCE]) == made_by.encode(
                [SOURCE]
            )
            assert same or not expected, name


def test_a_hugging_face_tokenizer_without_eos_is_refused(hf_folder):
    path = hf_folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("eos_token")
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"no end-of-document token.*eos_token"):
        tokenizers.load_tokenizer("hf", hf_folder)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        tokenizers.load_tokenizer("hf", tmp_path)


def test_without_transformers_the_message_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependency, match=r"pip install 'distill-pretrain\[hf\]'"):
        tokenizers.load_tokenizer("hf", tmp_path)


def test_text_that_is_not_utf8_is_named_though_sentencepiece_reads_it(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\n" * 2000)
    (tmp_path / "b.txt").write_bytes(b"abc\xff\n" * 2000)
    config = TokenizerConfig(vocab_size=300, training_bytes=100_000)
    corpus = CorpusConfig(paths=[tmp_path], output_dir=tmp_path / "out")
    with pytest.raises(CorpusError, match=r"not UTF-8; where: .*b\.txt"):
        training.train_tokenizer(corpus, config, sources.list_sources(corpus))


def adding_bos(values: dict) -> None:
    """Makes the tokenizer put <bos> before every text by itself."""
    token = {"id": 400, "content": "<bos>", "single_word": False, "lstrip": False}
    values["added_tokens"].append({**token, "rstrip": False, "normalized": False, "special": True})
    sequence = {"type_id": 0}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<bos>", **sequence}},
            {"Sequence": {"id": "A", **sequence}},
        ],
        "pair": [{"Sequence": {"id": "A", **sequence}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [400], "tokens": ["<bos>"]}},
    }


@pytest.fixture
def bos_folder(hf_folder):
    edited(hf_folder, MODEL, adding_bos)
    edited(hf_folder, SETTINGS, lambda values: values.update(bos_token="<bos>"))
    return hf_folder


def test_documents_begin_as_the_tokenizer_itself_begins_a_text(bos_folder):
    def bos_id(**asked) -> int | None:
        return tokenizers.load_tokenizer("hf", bos_folder, **asked).bos_id

    assert bos_id(bos="auto") == bos_id(bos="always") == 400
    assert bos_id(bos="never") is None and bos_id() is None
    # A tokenizer may have the token and not put it before a text.
    edited(bos_folder, MODEL, lambda values: values.update(post_processor=None))
    assert bos_id(bos="auto") is None
    assert bos_id(bos="always") == 400
    edited(bos_folder, SETTINGS, lambda values: values.pop("bos_token"))
    with pytest.raises(ConfigError, match=r"no BOS token; .*tokenizer\.bos: always.*bos=never"):
        bos_id(bos="always")


def test_the_tokens_around_documents_change_no_hash_of_a_tokenizer(tmp_path, bos_folder):
    def loaded(**asked):
        return tokenizers.load_tokenizer("hf", bos_folder, **asked)

    plain, other = loaded(), loaded(bos="always", end_of_document="!")
    assert (plain.eod_id, other.eod_id) == (0, other.encode(["!"])[0][0])
    assert plain.semantic_sha256 == other.semantic_sha256
    assert plain.encode([SOURCE]) == other.encode([SOURCE])
    # What a folder of tokens records gives the same tokens again.
    record = record_of(other, other.save(tmp_path), bos_id=400)
    again = recorded_tokenizer.load_recorded_tokenizer(tmp_path, record)
    assert (again.bos_id, again.eod_id) == (400, other.eod_id)
    assert recorded_tokenizer.is_same_tokenizer(record, tmp_path, bos_folder)


@pytest.mark.parametrize("kind", ["hf", "sentencepiece"])
def test_the_end_of_documents_is_a_token_or_an_id_that_is_there(tmp_path, request, kind):
    if kind == "hf":
        path = request.getfixturevalue("hf_folder")
    else:
        path = tmp_path / trained(tmp_path).save(tmp_path)

    def loaded(end_of_document):
        return tokenizers.load_tokenizer(kind, path, end_of_document=end_of_document)

    piece = loaded(None).id_to_piece(77)
    assert loaded(piece).eod_id == loaded(77).eod_id == 77
    size = loaded(None).vocab_size
    for wrong in (size, -1):
        with pytest.raises(ConfigError, match=rf"outside the vocabulary.*found: {wrong}; .*0 to"):
            loaded(wrong)
    with pytest.raises(ConfigError, match=r"lacks the end-of-document token.*'<nowhere>'"):
        loaded("<nowhere>")


def test_a_tokenizer_without_eos_can_be_told_what_ends_documents(hf_folder):
    edited(hf_folder, SETTINGS, lambda values: values.pop("eos_token"))
    assert tokenizers.load_tokenizer("hf", hf_folder, end_of_document="<eos>").eod_id == 0


@pytest.mark.parametrize(
    ("value", "is_right"), [("<x>", True), (7, True), (None, True), (True, False), (1.5, False)]
)
def test_the_end_of_documents_is_text_or_a_whole_number(value, is_right):
    if is_right:
        assert TokenizerConfig(end_of_document=value).end_of_document == value
    else:
        with pytest.raises(ValueError, match="end_of_document"):
            TokenizerConfig(end_of_document=value)
