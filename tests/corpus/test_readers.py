from __future__ import annotations

import bz2
import json
import os

import pytest

from distill_pretrain.corpus import readers, sources
from distill_pretrain.corpus.config import CorpusConfig
from distill_pretrain.errors import CorpusError


def corpus(tmp_path, *paths, **settings) -> CorpusConfig:
    return CorpusConfig(paths=paths, output_dir=tmp_path / "out", **settings)


def documents(config: CorpusConfig) -> list[str]:
    return [
        text
        for batch in readers.batches_of(sources.list_sources(config), config.text_key)
        for part in batch
        for text in readers.read_documents(part, config.text_key)
    ]


def names(config: CorpusConfig) -> list[str]:
    return [file.path.name for file in sources.list_sources(config).files]


def test_a_text_file_is_one_document_and_a_json_line_is_one(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\ttwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "x\\ny"}\n\n{"text": ""}\n{"text": "z"}')
    config = corpus(tmp_path, tmp_path / "a.txt", tmp_path / "b.jsonl")
    assert documents(config) == ["one\r\n\ttwo\n", "x\ny", "z"]


def test_directories_are_searched_in_one_order_with_patterns(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/skip/d.txt", "e.py", "sub/f.md", "sub-x.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    config = corpus(tmp_path, tmp_path / "in", exclude=("skip", "sub/f.md"))
    assert names(config) == ["a.txt", "b.txt", "c.txt", "sub-x.txt"]
    assert names(corpus(tmp_path, tmp_path / "in", include=("*.py",))) == ["e.py"]


def test_the_output_folder_is_not_part_of_the_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/merges.txt").write_text("b")
    assert names(corpus(tmp_path, tmp_path)) == ["a.txt"]


def test_a_file_named_twice_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    found = sources.list_sources(corpus(tmp_path, tmp_path, tmp_path / "a.txt"))
    assert (len(found.files), found.num_repeated) == (1, 1)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    assert documents(corpus(tmp_path, tmp_path / "a.txt", tmp_path / "b.jsonl")) == ["hello", "x"]


@pytest.mark.parametrize("slice_bytes", [1, 7, 64, 1000])
@pytest.mark.parametrize("end", ["", "\n"])
def test_every_line_is_in_exactly_one_slice(tmp_path, slice_bytes, end):
    texts = [f"{number}" * (number % 9 + 1) for number in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + end)
    (file,) = sources.list_sources(corpus(tmp_path, path)).files
    found = [
        text
        for part in readers.slices_of(file, slice_bytes)
        for text in readers.read_documents(part, "text")
    ]
    assert found == texts


def test_empty_files_in_a_directory_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("")
    found = sources.list_sources(corpus(tmp_path, tmp_path))
    assert [file.path.name for file in found.files] == ["a.txt"]
    assert found.num_empty == 1


def test_files_that_are_not_read_are_counted_by_kind(tmp_path):
    for name in ("a.txt", "b.txt.gz", "c.GZ", "README", "sub/d.py", "skip/e.py"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("x")
    os.mkfifo(tmp_path / "in/f.txt")
    found = sources.list_sources(corpus(tmp_path, tmp_path / "in", exclude=("skip",)))
    assert found.left_out == {"*.gz": 2, "*.py": 1, "without suffix": 1, "pipes and devices": 1}


def test_linked_folders_are_searched_once_and_circles_end(tmp_path):
    for name in ("in/a.txt", "in/real/b.txt", "outside/c.txt", "outside/sub/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    links = {
        "in/link": "outside",
        "in/again": "in/real",
        "in/up": ".",
        "outside/loop": "outside",
        "outside/sub/back": "in",
        "in/skipped": "outside",
    }
    for link, target in links.items():
        os.symlink(tmp_path / target, tmp_path / link)
    config = corpus(tmp_path, tmp_path / "in", exclude=("skipped",))
    files = sources.list_sources(config).files
    found = [file.path.relative_to(tmp_path / "in").as_posix() for file in files]
    assert found == ["a.txt", "link/c.txt", "link/sub/d.txt", "real/b.txt"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"text": "x"}\n{"text": "y"}\n', ["x", "y"]),
        ('{"text": "x"}', ["x"]),
        ('{"body": "x"}\n', ['{"body": "x"}\n']),
        ('{\n"text": "x"}\n', ['{\n"text": "x"}\n']),
        ('[{"text": "x"}]', ['[{"text": "x"}]']),
    ],
)
def test_a_json_file_of_json_lines_is_read_by_the_line(tmp_path, text, expected):
    (tmp_path / "a.json").write_text(text)
    assert documents(corpus(tmp_path, tmp_path / "a.json")) == expected


def test_what_is_packed_in_another_way_is_refused_as_what_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes(bz2.compress(b"text"))
    refused(corpus(tmp_path, tmp_path / "a.txt"), "found: bzip2 data.*unpack it first")


def refused(config: CorpusConfig, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        documents(config)


def test_a_missing_path_is_refused(tmp_path):
    refused(corpus(tmp_path, tmp_path / "nowhere.txt"), r"not found; where: .*nowhere\.txt")


def test_a_named_empty_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    refused(corpus(tmp_path, tmp_path / "a.txt"), r"is empty; where: .*a\.txt")


def test_a_directory_of_empty_files_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    refused(corpus(tmp_path, tmp_path), "the corpus is empty")


def test_a_directory_without_matching_files_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("a")
    refused(corpus(tmp_path, tmp_path), r"no file of this directory.*set corpus\.include")


def test_a_binary_file_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\0def")
    refused(corpus(tmp_path, tmp_path / "a.txt"), "not text.*NUL byte at offset 3.*corpus.paths")
    refused(corpus(tmp_path, tmp_path), r"corpus\.exclude=\['a\.txt'\]")


def test_bytes_that_are_not_utf8_are_refused_with_their_offset(tmp_path):
    (tmp_path / "a.txt").write_bytes("aé".encode() + b"\xff\n")
    refused(corpus(tmp_path, tmp_path), r"not UTF-8; where: .*a\.txt; found: byte 0xff at offset 3")


def test_bytes_that_are_not_utf8_in_a_later_json_line_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    refused(corpus(tmp_path, tmp_path), "byte 0xff at offset 24")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "is not JSON"),
        ("[1]", "is not an object"),
        ('{"body": "x"}', r"lacks the key 'text'.*\['body'\].*corpus\.text_key"),
        ('{"text": 5}', "is not text; .*int"),
        ('{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_malformed_json_line_is_refused_with_its_number(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(CorpusError, match=message) as caught:
        documents(corpus(tmp_path, tmp_path))
    assert f"{tmp_path}/a.jsonl:3" in str(caught.value)


def test_a_broken_link_in_a_directory_is_refused(tmp_path):
    os.symlink(tmp_path / "nowhere", tmp_path / "a.txt")
    refused(corpus(tmp_path, tmp_path), "broken link")
