from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from distill_pretrain.corpus import build, readers, sources, special_tokens
from distill_pretrain.corpus.config import CorpusConfig, TokenizerConfig
from distill_pretrain.corpus.token_index import TokenIndex
from distill_pretrain.corpus.tokens_record import TokensRecord
from distill_pretrain.errors import ConfigError, CorpusError, InUse, TokenizerMismatch
from distill_pretrain.files import ownership
from distill_pretrain.files.ownership import owner_beside
from tests.support.notices import noted
from tests.support.owner import owned_elsewhere

TOKENIZER = TokenizerConfig(vocab_size=350)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Many units of work, as a large corpus has."""
    monkeypatch.setattr(
        build, "batches_of", functools.partial(readers.batches_of, slice_bytes=6000)
    )


def config(texts: Path, output: Path, **settings) -> CorpusConfig:
    defaults = {"paths": [texts], "held_out_fraction": 0.2, "workers": 1}
    return CorpusConfig(output_dir=output, **{**defaults, **settings})


def content(folder: Path) -> dict[str, bytes]:
    """Every file but those that hold times or the folder's own name."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name != "recipe.yaml" and not path.name.endswith(".fingerprint.json")
    }


def decoded(folder: Path, name: str) -> list[str]:
    tokenizer = build.load_tokenizer_of(folder)
    index = TokenIndex.open(folder / name, vocab_size=tokenizer.vocab_size)
    texts = []
    for document in range(index.num_documents):
        ids = index.read(document, 0, int(index.document_lengths[document]))
        assert ids[-1] == tokenizer.eod_id
        texts.append(tokenizer.decode(ids[:-1]))
    return texts


def corpus_texts(corpus: CorpusConfig) -> list[str]:
    return [
        text
        for batch in readers.batches_of(sources.list_sources(corpus), corpus.text_key)
        for part in batch
        for text in readers.read_documents(part, corpus.text_key)
    ]


def test_every_document_is_in_exactly_one_split_in_corpus_order(texts, tmp_path):
    corpus = config(texts, tmp_path / "out")
    result = build.tokenize_corpus(corpus, TOKENIZER)
    train, held_out = (decoded(tmp_path / "out", name) for name in ("train", "held_out"))
    everything = corpus_texts(corpus)
    chosen = [build.is_held_out(n, seed=corpus.seed, fraction=0.2) for n in range(100)]
    assert train == [text for text, out in zip(everything, chosen, strict=True) if not out]
    assert held_out == [text for text, out in zip(everything, chosen, strict=True) if out]
    assert result.num_documents == {"train": len(train), "held_out": len(held_out)}
    assert 8 <= len(held_out) <= 32


def test_the_split_depends_on_the_seed_and_the_fraction_only():
    def split(**kwargs):
        return {n for n in range(2000) if build.is_held_out(n, **kwargs)}

    assert split(seed=1, fraction=0.1) != split(seed=2, fraction=0.1)
    assert split(seed=1, fraction=0.1) < split(seed=1, fraction=0.2)
    assert split(seed=1, fraction=0.0) == set()
    assert 150 < len(split(seed=1, fraction=0.1)) < 250


def test_output_is_the_same_for_any_number_of_workers(texts, tmp_path):
    build.tokenize_corpus(config(texts, tmp_path / "one"), TOKENIZER)
    build.tokenize_corpus(config(texts, tmp_path / "two", workers=2), TOKENIZER)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert set(content(tmp_path / "one")) == {
        *("train.bin", "train.idx", "held_out.bin", "held_out.idx"),
        *("tokens.json", "sources.json", "tokenizer.model"),
    }


def test_a_bad_document_found_by_a_worker_is_reported_and_leaves_nothing(texts, tmp_path):
    (texts / "sub/zz.txt").write_bytes(b"fine\n" * 2000 + b"\xff")
    given = config(texts, tmp_path / "given")
    (texts / "sub/zz.txt").rename(tmp_path / "zz.txt")
    build.tokenize_corpus(given, TOKENIZER)
    (tmp_path / "zz.txt").rename(texts / "sub/zz.txt")
    trained = TokenizerConfig(path=tmp_path / "given/tokenizer.model")
    with pytest.raises(CorpusError, match=r"zz\.txt; found: byte 0xff at offset 10000"):
        build.tokenize_corpus(config(texts, tmp_path / "out", workers=2), trained)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given", "texts"]


def test_the_record_says_what_made_the_tokens(texts, tmp_path):
    build.tokenize_corpus(config(texts, tmp_path / "out"), TOKENIZER)
    record = TokensRecord.load(tmp_path / "out")
    tokenizer = build.load_tokenizer_of(tmp_path / "out")
    assert record.tokenizer == {
        "kind": "sentencepiece",
        "sha256": tokenizer.sha256,
        "vocab_size": 350,
        "file": "tokenizer.model",
    }
    assert (record.vocab_size, record.eod_id) == (350, tokenizer.eod_id)
    assert set(record.corpora) == {"train", "held_out"}
    assert record.software["sentencepiece"]


def test_running_again_writes_nothing(texts, tmp_path):
    first = build.tokenize_corpus(config(texts, tmp_path / "out"), TOKENIZER)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = build.tokenize_corpus(config(texts, tmp_path / "out", workers=2), TOKENIZER)
    assert (first.already_done, again.already_done) == (False, True)
    assert again.num_tokens == first.num_tokens
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("corpus_settings", "tokenizer", "message"),
    [
        ({"seed": 7}, TOKENIZER, r"corpus\.seed"),
        ({}, TokenizerConfig(vocab_size=351), r"tokenizer\.vocab_size"),
        ({"exclude": ["00.txt"]}, TOKENIZER, r"corpus\.exclude"),
    ],
)
def test_another_recipe_never_overwrites(texts, tmp_path, corpus_settings, tokenizer, message):
    build.tokenize_corpus(config(texts, tmp_path / "out"), TOKENIZER)
    before = content(tmp_path / "out")
    with pytest.raises(CorpusError, match=rf"{message}.*remedy: set corpus\.output_dir"):
        build.tokenize_corpus(config(texts, tmp_path / "out", **corpus_settings), tokenizer)
    assert content(tmp_path / "out") == before


def test_a_corpus_that_grew_is_noticed(texts, tmp_path):
    build.tokenize_corpus(config(texts, tmp_path / "out"), TOKENIZER)
    (texts / "new.txt").write_text("new")
    with pytest.raises(CorpusError, match="other source files"):
        build.tokenize_corpus(config(texts, tmp_path / "out"), TOKENIZER)


def test_a_corpus_edited_without_a_change_of_size_is_noticed(texts, tmp_path):
    corpus = config(texts, tmp_path / "out")
    build.tokenize_corpus(corpus, TOKENIZER)
    path = texts / "00.txt"
    before = path.read_text()
    os.utime(path, ns=(0, 0))
    assert build.tokenize_corpus(corpus, TOKENIZER).already_done
    path.write_text(before.swapcase())
    assert len(path.read_bytes()) == len(before)
    with pytest.raises(CorpusError, match=r"other contents: files have changed, such as .*00\.txt"):
        build.tokenize_corpus(corpus, TOKENIZER)


def test_tokens_of_an_earlier_version_stay_done_and_a_later_edit_is_said(texts, tmp_path):
    corpus = config(texts, tmp_path / "out")
    build.tokenize_corpus(corpus, TOKENIZER)
    path = tmp_path / "out/sources.json"
    old = json.loads(path.read_text())
    del old["stamp"], old["content_sha256"]
    path.write_text(json.dumps(old))
    with noted() as said:
        assert build.tokenize_corpus(corpus, TOKENIZER).already_done
        assert not said
        (texts / "00.txt").write_text((texts / "00.txt").read_text().swapcase())
        assert build.tokenize_corpus(corpus, TOKENIZER).already_done
    assert "00.txt was written after the tokens" in said[0]


def test_files_that_change_while_they_are_read_are_not_vouched_for(texts, tmp_path):
    corpus = config(texts, tmp_path / "out")
    path = texts / "00.txt"

    def edit(done: int, total: int, documents: int) -> None:
        path.write_text(path.read_text().swapcase())

    build.tokenize_corpus(corpus, TOKENIZER, on_progress=edit)
    with pytest.raises(CorpusError, match="other contents"):
        build.tokenize_corpus(corpus, TOKENIZER)


def test_damaged_tokens_are_not_taken_for_done(texts, tmp_path):
    build.tokenize_corpus(config(texts, tmp_path / "out"), TOKENIZER)
    path = tmp_path / "out/train.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorpusError, match="not what was written"):
        build.tokenize_corpus(config(texts, tmp_path / "out"), TOKENIZER)


def test_a_given_tokenizer_is_used_and_its_replacement_noticed(texts, tmp_path):
    build.tokenize_corpus(config(texts, tmp_path / "a"), TOKENIZER)
    (tmp_path / "my.model").write_bytes((tmp_path / "a/tokenizer.model").read_bytes())
    given = TokenizerConfig(path=tmp_path / "my.model")
    build.tokenize_corpus(config(texts, tmp_path / "b"), given)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    build.tokenize_corpus(config(texts, tmp_path / "c"), TokenizerConfig(vocab_size=360))
    (tmp_path / "my.model").write_bytes((tmp_path / "c/tokenizer.model").read_bytes())
    with pytest.raises(TokenizerMismatch, match="another tokenizer"):
        build.tokenize_corpus(config(texts, tmp_path / "b"), given)


def test_a_replaced_tokenizer_beside_the_tokens_is_noticed(texts, tmp_path):
    build.tokenize_corpus(config(texts, tmp_path / "a"), TOKENIZER)
    build.tokenize_corpus(config(texts, tmp_path / "b"), TokenizerConfig(vocab_size=360))
    (tmp_path / "a/tokenizer.model").write_bytes((tmp_path / "b/tokenizer.model").read_bytes())
    with pytest.raises(TokenizerMismatch, match="not the one that made them"):
        build.load_tokenizer_of(tmp_path / "a")


def test_a_hugging_face_tokenizer_needs_a_path(texts, tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.path"):
        build.tokenize_corpus(config(texts, tmp_path / "out"), TokenizerConfig(kind="hf"))
    assert not (tmp_path / "out.part").exists()


def test_an_empty_split_is_refused(texts, tmp_path):
    with pytest.raises(CorpusError, match=r"the held_out split is empty.*held_out_fraction=0"):
        build.tokenize_corpus(config(texts, tmp_path / "out", held_out_fraction=1e-9), TOKENIZER)
    assert not (tmp_path / "out").exists()


def test_no_held_out_split_is_written_for_fraction_zero(texts, tmp_path):
    build.tokenize_corpus(config(texts, tmp_path / "out", held_out_fraction=0), TOKENIZER)
    assert not list((tmp_path / "out").glob("held_out*"))
    assert set(TokensRecord.load(tmp_path / "out").corpora) == {"train"}


def test_a_corpus_of_empty_documents_is_refused(texts, tmp_path):
    build.tokenize_corpus(config(texts, tmp_path / "a"), TOKENIZER)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": ""}) + "\n")
    given = TokenizerConfig(path=tmp_path / "a/tokenizer.model")
    with pytest.raises(CorpusError, match="the corpus is empty"):
        build.tokenize_corpus(config(tmp_path / "b.jsonl", tmp_path / "out"), given)


def test_a_folder_with_other_files_is_not_touched(texts, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("precious")
    with pytest.raises(CorpusError, match=r"holds something else.*thesis\.txt"):
        build.tokenize_corpus(config(texts, tmp_path / "out"), TOKENIZER)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_two_runs_into_one_folder_do_not_mix(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "PATIENCE_S", 0.2)
    out = tmp_path / "out"
    with (
        owned_elsewhere(owner_beside(out)) as holder,
        pytest.raises(InUse, match=rf"process {holder.pid} on node7, since .*corpus\.output_dir"),
    ):
        build.tokenize_corpus(config(texts, out), TOKENIZER)
    # One that waited for the other finds that all is done.
    build.tokenize_corpus(config(texts, out), TOKENIZER)
    record = (out / "tokens.json").read_bytes()

    def late(owner):
        (tmp_path / "aside").rename(out)
        return real(owner)

    real = ownership.try_to_own
    out.rename(tmp_path / "aside")
    monkeypatch.setattr(ownership, "try_to_own", late)
    assert build.tokenize_corpus(config(texts, out), TOKENIZER).already_done
    assert (out / "tokens.json").read_bytes() == record
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]


KILLED = """
    import functools, os, signal, sys
    from pathlib import Path
    from distill_pretrain.corpus import build, readers
    from distill_pretrain.corpus.config import CorpusConfig, TokenizerConfig

    def die(done, total, documents):
        import psutil
        if done > total // 3:
            for child in psutil.Process().children(recursive=True):
                print(child.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    if __name__ == "__main__":
        build.batches_of = functools.partial(readers.batches_of, slice_bytes=6000)
        build.tokenize_corpus(
            CorpusConfig(
                paths=[sys.argv[1]], output_dir=sys.argv[2], held_out_fraction=0.2, workers=2
            ),
            TokenizerConfig(vocab_size=350),
            on_progress=die,
        )
"""


def test_a_killed_run_leaves_nothing_behind_and_the_next_gives_the_same_bytes(texts, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    killed = subprocess.run(
        [sys.executable, script, texts, tmp_path / "out"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(build.__file__).parents[2])},
        timeout=60,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.part").iterdir())
    workers = [int(pid) for pid in killed.stdout.split()]
    assert len(workers) >= 2
    deadline = time.monotonic() + 20
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_runs, workers))

    build.tokenize_corpus(config(texts, tmp_path / "out"), TOKENIZER)
    build.tokenize_corpus(config(texts, tmp_path / "clean"), TOKENIZER)
    assert content(tmp_path / "out") == content(tmp_path / "clean")
    assert not (tmp_path / "out.part").exists()


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_documents_begin_and_end_with_the_tokens_that_are_asked_for(texts, tmp_path):
    plain = config(texts, tmp_path / "plain", held_out_fraction=0)
    with noted() as said:
        build.tokenize_corpus(plain, TOKENIZER)
    assert "documents begin with their text and end with '</s>' (id 2)" in said
    first = TokenIndex.open(tmp_path / "plain/train").read(0, 0, 16).tolist()
    text = build.load_tokenizer_of(tmp_path / "plain").decode(first)
    assert said[-1].startswith("train begins with '") and said[-1].endswith(f"as text {text!r}")
    asked = TokenizerConfig(vocab_size=350, bos="always", end_of_document="<unk>")
    out = config(texts, tmp_path / "out", held_out_fraction=0)
    with noted() as said:
        build.tokenize_corpus(out, asked)
    assert "documents begin with '<s>' (id 1) and end with '<unk>' (id 0)" in said
    found, before = (TokenIndex.open(tmp_path / name / "train") for name in ("out", "plain"))
    for document in range(found.num_documents):
        length = int(found.document_lengths[document])
        ids = found.read(document, 0, length).tolist()
        assert [1, *before.read(document, 0, length - 2).tolist(), 0] == ids
    record = TokensRecord.load(tmp_path / "out")
    assert (record.bos_id, record.eod_id) == (1, 0)
    assert build.tokenize_corpus(out, asked).already_done
    again = build.load_tokenizer_of(tmp_path / "out")
    assert (again.bos_id, again.eod_id) == (1, 0)
    for other, key in (({"bos": "never"}, "bos"), ({"end_of_document": 2}, "end_of_document")):
        changed = asked.model_copy(update=other)
        with pytest.raises(CorpusError, match=rf"another value of tokenizer\.{key}"):
            build.tokenize_corpus(out, changed)
    # The same by another name is the same.
    assert build.tokenize_corpus(out, asked.model_copy(update={"end_of_document": 0})).already_done


def test_tokens_that_an_earlier_version_made_without_bos_stay_done(texts, tmp_path, monkeypatch):
    """Under `auto` a folder is what it is; what a new one would be is said."""
    out = config(texts, tmp_path / "out")
    build.tokenize_corpus(out, TOKENIZER)
    path = tmp_path / "out/recipe.yaml"
    kept = [line for line in path.read_text().splitlines() if "bos" not in line]
    path.write_text("\n".join(line for line in kept if "end_of_document" not in line))
    before = content(tmp_path / "out")
    assert "bos" not in (tmp_path / "out/tokens.json").read_text()
    # As if sentencepiece models put <s> before a text.
    monkeypatch.setattr(
        special_tokens.FoundTokens,
        "begin",
        lambda found, mode, where: None if mode == "never" else found.bos,
    )
    with noted() as said:
        assert build.tokenize_corpus(out, TOKENIZER).already_done
    assert any("begins texts with '<s>' (id 1), which these documents lack" in s for s in said)
    assert content(tmp_path / "out") == before
