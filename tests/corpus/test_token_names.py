"""Ids are shown by tokenizer.json alone as transformers shows them, without importing it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distill_pretrain.corpus import tokenizers
from distill_pretrain.corpus.token_names import FastTokenNames, recorded_token_names
from distill_pretrain.corpus.token_writer import TokenIndexWriter
from distill_pretrain.corpus.tokens_record import TokensRecord
from distill_pretrain.errors import TokenizerMismatch

TEXT = "the cat, the hat and <eos> in one text; größer\n" * 20


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of tokens that a Hugging Face tokenizer made."""
    library = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    model.train_from_iterator([TEXT], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")
    fast.save_pretrained(tmp_path / "tokenizer")
    tokenizer = tokenizers.load_tokenizer("hf", tmp_path / "tokenizer")
    with TokenIndexWriter(tmp_path / "train", tokenizer.vocab_size) as writer:
        ids = [*tokenizer.encode([TEXT])[0], tokenizer.eod_id]
        writer.add_document(np.array(ids, dtype=np.int64))
    made_by = {"kind": "hf", "sha256": tokenizer.sha256, "file": "tokenizer"}
    record = TokensRecord(
        tokenizer={**made_by, "vocab_size": tokenizer.vocab_size},
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        corpora={},
        software={},
    )
    record.save(tmp_path)
    return tmp_path


def test_names_are_those_of_transformers(corpus: Path) -> None:
    names = recorded_token_names(corpus, TokensRecord.load(corpus))
    assert isinstance(names, FastTokenNames)
    whole = tokenizers.load_tokenizer("hf", corpus / "tokenizer")
    ids = [*whole.encode([TEXT])[0], whole.eod_id]
    assert names.decode(ids) == whole.decode(ids)
    every = range(whole.vocab_size)
    assert [names.id_to_piece(n) for n in every] == [whole.id_to_piece(n) for n in every]


def test_another_tokenizer_than_the_recorded_one_is_refused(corpus: Path) -> None:
    file = corpus / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(TokenizerMismatch):
        recorded_token_names(corpus, TokensRecord.load(corpus))


def test_inspecting_a_corpus_imports_nothing_large(corpus: Path) -> None:
    code = (
        "import sys; from distill_pretrain.cli.main import main; "
        f"status = main(['inspect', {str(corpus / 'train')!r}]); "
        "sys.exit(status or [m for m in ('transformers', 'torch', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 or done.stderr == "[]\n", done.stderr
    assert "the cat" in done.stdout and "<eos>" in done.stdout
