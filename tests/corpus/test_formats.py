"""One corpus in every wrapping it may come in, and what damages do to each."""

from __future__ import annotations

import functools
import gzip
import http.server
import importlib.util
import itertools
import json
import random
import re
import threading
from pathlib import Path

import pytest

from distill_pretrain.corpus import build, readers, sources, training, unpacking
from distill_pretrain.corpus.config import CorpusConfig, TokenizerConfig
from distill_pretrain.errors import CorpusError, MissingDependency
from tests.corpus.conftest import text_of

pa = pytest.importorskip("pyarrow")
fsspec = pytest.importorskip("fsspec")
TEXTS = [text_of(number, lines=number % 7) for number in range(60)] + ["é\n日本", "", "\x00 NUL"]
LINES = "".join(json.dumps({"n": n, "text": text}) + "\n" for n, text in enumerate(TEXTS)).encode()


def zstd(data: bytes) -> bytes:
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(data)
    return packed.getvalue().to_pybytes()


def table(texts=TEXTS, kind=None):
    return pa.table({"n": list(range(len(texts))), "text": pa.array(texts, kind or pa.string())})


def write_parquet(path: Path, content=None, **settings) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(content or table(), path, **{"row_group_size": 7, **settings})


def write_stream(path: Path, content=None) -> None:
    content = content or table()
    with pa.ipc.new_stream(path, content.schema) as stream:
        stream.write_table(content, max_chunksize=9)


def write_dataset(folder: Path) -> None:
    """As `datasets.Dataset.save_to_disk` does, with a cache that a later `map` left there."""
    folder.mkdir()
    for number, part in enumerate((table(TEXTS[:20]), table(TEXTS[20:]))):
        write_stream(folder / f"data-{number:05d}-of-00002.arrow", part)
    write_stream(folder / "cache-0123.arrow", table(["stray"]))
    names = [{"filename": f"data-{number:05d}-of-00002.arrow"} for number in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": names}))
    (folder / "dataset_info.json").write_text("{}")


def with_file_format(path: Path) -> None:
    with pa.ipc.new_file(path, table().schema) as stream:
        stream.write_table(table(), max_chunksize=9)


def cut_in_two(data: bytes, pack) -> bytes:
    """Two members or frames, the border of which is in the middle of a line."""
    return pack(data[: len(data) // 2]) + pack(data[len(data) // 2 :])


WRAPPED = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.jsonl.gz": lambda path: path.write_bytes(cut_in_two(LINES, gzip.compress)),
    "a.jsonl.zst": lambda path: path.write_bytes(cut_in_two(LINES, zstd)),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "named_plain.jsonl": lambda path: path.write_bytes(gzip.compress(LINES)),
    "named_packed.jsonl.gz": lambda path: path.write_bytes(LINES),
    "named_gz.jsonl.gz": lambda path: path.write_bytes(zstd(LINES)),
    "a.parquet": write_parquet,
    "large.parquet": lambda path: write_parquet(path, table(kind=pa.large_string())),
    "dictionary.parquet": lambda path: write_parquet(
        path, table(kind=pa.dictionary(pa.int32(), pa.string()))
    ),
    "stream.arrow": write_stream,
    "file.arrow": with_file_format,
    "dataset": write_dataset,
}


def corpus(tmp_path: Path, path: Path | str, output="out", **settings) -> CorpusConfig:
    return CorpusConfig(paths=[path], output_dir=tmp_path / output, **{"workers": 1, **settings})


def documents(config: CorpusConfig, slice_bytes: int = 700) -> list[str]:
    listed = sources.list_sources(config)
    batches = list(readers.batches_of(listed, config.text_key, slice_bytes))
    assert sum(part.num_bytes for batch in batches for part in batch) == listed.num_bytes
    return [
        text
        for batch in batches
        for part in batch
        for text in readers.read_documents(part, config.text_key)
    ]


@pytest.mark.parametrize("name", WRAPPED)
def test_a_text_is_the_same_whatever_it_is_wrapped_in(tmp_path, name):
    WRAPPED[name](tmp_path / name)
    for slice_bytes in (64, 700, 1 << 20):
        assert documents(corpus(tmp_path, tmp_path / name), slice_bytes) == list(
            filter(None, TEXTS)
        )


@pytest.fixture
def server(tmp_path):
    """The folder `served` behind HTTP, with ranges as the servers of data sets give them."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            path = Path(self.translate_path(self.path))
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted is None or path.is_dir():
                return super().do_GET()
            data = path.read_bytes()[int(wanted[1]) : int(wanted[2]) + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return None

        def log_message(self, *args):
            pass

    (tmp_path / "served").mkdir()
    handler = functools.partial(Handler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_text_behind_a_web_address_is_the_same(tmp_path, server, name):
    pytest.importorskip("aiohttp")
    WRAPPED[name](tmp_path / "served" / name)
    assert documents(corpus(tmp_path, f"{server}/{name}")) == list(filter(None, TEXTS))
    with pytest.raises(CorpusError, match=r"not found; where: http://.*/nowhere\.jsonl"):
        documents(corpus(tmp_path, f"{server}/nowhere.jsonl"))


@pytest.fixture
def store():
    """A store in memory, empty before and after."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def test_a_folder_of_a_store_is_read_as_one_of_a_disk(tmp_path, store):
    local = tmp_path / "in"
    for name in ("b.jsonl.gz", "sub/a.jsonl", "sub/skip/c.jsonl", "sub-x.parquet"):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        WRAPPED["a" + "".join(Path(name).suffixes)](local / name)
    (local / "d.py").write_text("x")
    write_dataset(local / "sub/ds")
    store.put(str(local), "/in", recursive=True)
    found = {}
    for place in (local, "memory://in"):
        config = corpus(tmp_path, place, exclude=("skip",))
        listed = sources.list_sources(config)
        found[str(place)] = [file.path.name for file in listed.files], documents(config)
        assert listed.left_out == {"*.py": 1}
    assert found[str(local)] == found["memory://in"]
    assert found[str(local)][0] == [
        *("b.jsonl.gz", "a.jsonl", "data-00000-of-00002.arrow", "data-00001-of-00002.arrow"),
        "sub-x.parquet",
    ]


def test_tokens_are_the_same_in_every_wrapping_and_for_any_number_of_workers(
    tmp_path, monkeypatch, store
):
    monkeypatch.setattr(
        build, "batches_of", functools.partial(readers.batches_of, slice_bytes=2000)
    )
    tokenizer = TokenizerConfig(vocab_size=350)
    tokens = {}
    for number, name in enumerate(("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "dataset")):
        WRAPPED[name](tmp_path / name)
        workers = 2 if name in ("a.jsonl.gz", "a.parquet") else 1
        progress: list[tuple[int, int, int]] = []
        config = corpus(tmp_path, tmp_path / name, f"out{number}", workers=workers)
        build.tokenize_corpus(
            config, tokenizer, on_progress=lambda *now, to=progress: to.append(now)
        )
        listed = sources.list_sources(config)
        assert progress[-1] == (listed.num_bytes, listed.num_bytes, len(list(filter(None, TEXTS))))
        assert progress == sorted(progress)
        out = tmp_path / f"out{number}"
        # The tokenizer is trained on the same pieces, too.
        files = ("train.bin", "train.idx", "held_out.bin", "held_out.idx", "tokenizer.model")
        tokens[name] = [(out / file).read_bytes() for file in files]
        assert tokens[name] == tokens["a.jsonl"], name


def test_a_change_behind_a_url_is_noticed(tmp_path, store):
    store.pipe("/in/a.jsonl", LINES)
    config = corpus(tmp_path, "memory://in/a.jsonl")
    tokenizer = TokenizerConfig(vocab_size=350)
    assert not build.tokenize_corpus(config, tokenizer).already_done
    assert build.tokenize_corpus(config, tokenizer).already_done
    store.pipe("/in/a.jsonl", LINES.swapcase().replace(b'"TEXT"', b'"text"'))
    with pytest.raises(CorpusError, match="other contents"):
        build.tokenize_corpus(config, tokenizer)


def test_the_sample_of_what_is_unpacked_on_the_way_is_bounded_and_spread(tmp_path):
    texts = [f"{number:06d}" for number in range(20_000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    config = corpus(tmp_path, tmp_path / "a.jsonl.gz")
    listed = sources.list_sources(config)
    sample = list(training._sample(config, TokenizerConfig(training_bytes=30_000), listed))
    assert 15_000 <= sum(map(len, sample)) <= 30_000
    assert sample == sorted(sample)
    numbers = [int(piece) for piece in sample]
    assert numbers[0] == 0 and numbers[-1] > 19_000
    assert len({after - before for before, after in itertools.pairwise(numbers)}) == 1
    long = "".join(random.Random(0).choices("ab ", k=200_000))
    assert [len(piece) for piece in training._thinned([long], 1000)] == [1000]


def cut(name: str, num_bytes: int):
    def write(path: Path) -> None:
        WRAPPED[name](path)
        path.write_bytes(path.read_bytes()[:-num_bytes])

    return write


def flipped(name: str, place: float):
    def write(path: Path) -> None:
        WRAPPED[name](path)
        data = bytearray(path.read_bytes())
        data[int(len(data) * place)] ^= 0x55
        path.write_bytes(data)

    return write


def not_utf8() -> pa.Array:
    data = pa.py_buffer(b"ab" + b"c\xff")
    offsets = pa.py_buffer(b"\0\0\0\0" + b"\2\0\0\0" + b"\4\0\0\0")
    return pa.table({"text": pa.Array.from_buffers(pa.string(), 2, [None, offsets, data])})


BAD = {
    "gzip that is cut off": (
        "a.jsonl.gz",
        cut("a.jsonl.gz", 9),
        r"cut off; where: .*a\.jsonl\.gz, behind line \d+.*found: gzip data that ends.*copy or download",
    ),
    "zstd that is cut off": (
        "a.jsonl.zst",
        cut("a.jsonl.zst", 5),
        r"cut off; where: .*a\.jsonl\.zst, behind line \d+.*zstd data that ends",
    ),
    "damaged gzip": ("a.jsonl.gz", flipped("a.jsonl.gz", 0.8), r"damaged; where: .*behind line"),
    "damaged zstd": ("a.jsonl.zst", flipped("a.jsonl.zst", 0.8), r"damaged; where: .*behind line"),
    "a line of packed JSONL": (
        "a.jsonl.gz",
        lambda path: path.write_bytes(gzip.compress(LINES + b"{\n")),
        rf"not JSON; where: .*a\.jsonl\.gz:{len(TEXTS) + 1}; found: {{",
    ),
    "packed text that is no UTF-8": (
        "a.txt.gz",
        lambda path: path.write_bytes(gzip.compress(b"abc\xff")),
        r"not UTF-8; where: .*a\.txt\.gz; found: byte 0xff at offset 3",
    ),
    "packed twice": (
        "a.txt.gz",
        lambda path: path.write_bytes(gzip.compress(gzip.compress(b"abc"))),
        "not text.*gzip data",
    ),
    "Parquet without the column": (
        "a.parquet",
        lambda path: write_parquet(path, pa.table({"body": ["x"], "n": [1]})),
        r"lacks the column 'text'; where: .*a\.parquet; found: columns \['body', 'n'\].*corpus\.text_key",
    ),
    "Parquet of numbers": (
        "a.parquet",
        lambda path: write_parquet(path, pa.table({"text": [1, 2]})),
        r"'text' is not text; where: .*found: int64; expected: string",
    ),
    "Parquet with a null": (
        "a.parquet",
        lambda path: write_parquet(path, table([*TEXTS, None])),
        rf"no text in the column 'text'; where: .*a\.parquet, row {len(TEXTS)} .*found: null",
    ),
    "Parquet that is cut off": (
        "a.parquet",
        cut("a.parquet", 100),
        r"cut off; where: .*its footer",
    ),
    "damaged Parquet": (
        "a.parquet",
        lambda path: _damage_a_page(path),
        r"Parquet file is damaged.*a\.parquet, row group 1",
    ),
    "Arrow that is cut off": (
        "a.arrow",
        cut("stream.arrow", 20),
        r"Arrow stream file is damaged or cut off; where: .*record batch 6",
    ),
    "Arrow that is cut off between two batches": (
        "a.arrow",
        cut("stream.arrow", 8),
        r"Arrow file is cut off; where: .*behind record batch 6",
    ),
    "Arrow that is no UTF-8": (
        "a.arrow",
        lambda path: write_stream(path, not_utf8()),
        r"not UTF-8; where: .*a\.arrow, row 1 .*byte 0xff at offset 1",
    ),
}


def _damage_a_page(path: Path) -> None:
    write_parquet(path, write_page_checksum=True, use_dictionary=False, compression="none")
    data = path.read_bytes()
    place = len(data) // 10 + data[len(data) // 10 :].index(b"return")
    path.write_bytes(data[:place] + b"Return" + data[place + 6 :])


@pytest.mark.parametrize("case", BAD)
def test_damages_are_named_with_their_place_and_remedy(tmp_path, case):
    name, write, message = BAD[case]
    write(tmp_path / name)
    with pytest.raises(CorpusError, match=message) as caught:
        documents(corpus(tmp_path, tmp_path / name))
    assert len(str(caught.value)) < 600


def test_a_failure_in_the_middle_leaves_nothing_and_finished_tokens_alone(tmp_path):
    cut("a.jsonl.gz", 9)(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.txt").write_text(text_of(1, lines=300))
    good = corpus(tmp_path, tmp_path / "b.txt", "good", held_out_fraction=0)
    build.tokenize_corpus(good, TokenizerConfig(vocab_size=300))
    given = TokenizerConfig(path=tmp_path / "good/tokenizer.model")
    with pytest.raises(CorpusError, match="cut off"):
        build.tokenize_corpus(corpus(tmp_path, tmp_path / "a.jsonl.gz"), given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl.gz", "b.txt", "good"]


def test_which_split_of_a_dataset_is_meant_has_to_be_said(tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        write_dataset(folder / split)
    with pytest.raises(CorpusError, match=r"several splits.*train, test.*sets/train.*'test'"):
        sources.list_sources(corpus(tmp_path, folder))
    expected = documents(corpus(tmp_path, folder / "train"))
    assert documents(corpus(tmp_path, folder, exclude=("test",))) == expected
    (folder / "train/data-00001-of-00002.arrow").unlink()
    with pytest.raises(CorpusError, match=r"missing.*data-00001-of-00002\.arrow"):
        sources.list_sources(corpus(tmp_path, folder / "train"))
    state = folder / "test/state.json"
    files = json.loads(state.read_text())["_data_files"]
    state.write_text(json.dumps({"_data_files": files, "_indices_data_files": files}))
    with pytest.raises(CorpusError, match=r"selection of its rows.*flatten_indices"):
        sources.list_sources(corpus(tmp_path, folder / "test"))


def test_a_dataset_that_the_library_saved_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_dict({"n": list(range(len(TEXTS))), "text": TEXTS})
    whole.select(range(40)).save_to_disk(tmp_path / "saved", num_shards=3)
    assert documents(corpus(tmp_path, tmp_path / "saved")) == list(filter(None, TEXTS[:40]))


def test_a_document_longer_than_any_may_be_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_DOCUMENT", 5000)
    long = json.dumps({"text": "x" * 6000}).encode()
    for name, data in {
        "a.jsonl": LINES + long,
        "a.jsonl.gz": gzip.compress(LINES + long),
    }.items():
        (tmp_path / name).write_bytes(data)
        message = rf"too long; where: .*{name}:{len(TEXTS) + 1}; found: more than"
        with pytest.raises(CorpusError, match=message):
            documents(corpus(tmp_path, tmp_path / name))
    for name, data in {"a.txt": b"x" * 6000, "a.txt.gz": gzip.compress(b"x" * 6000)}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CorpusError, match=rf"too long; where: .*{name}; .*cut it"):
            documents(corpus(tmp_path, tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet", "dataset"])
def test_without_pyarrow_the_message_says_what_to_install(tmp_path, monkeypatch, name):
    WRAPPED[name](tmp_path / name)

    def without(name):
        raise ImportError(name)

    monkeypatch.setattr(unpacking.importlib, "import_module", without)
    with pytest.raises(MissingDependency, match=r"pip install 'distill-pretrain\[corpora\]'"):
        documents(corpus(tmp_path, tmp_path / name))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense://a", r"URL cannot be used; where: nonsense://a; .*corpus\.paths"),
        ("s3://bucket/a.jsonl", r"pip install 'distill-pretrain\[s3\]'"),
    ],
)
def test_a_url_that_nothing_here_reads_is_refused(tmp_path, url, message):
    if url.startswith("s3") and importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises((CorpusError, MissingDependency), match=message):
        sources.list_sources(corpus(tmp_path, url))
