"""Capture by several replicas: killed, restarted, joining late, held by several processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from distill_pretrain.cli.main import main
from distill_pretrain.corpus.token_writer import TokenIndexWriter
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import open_cache, open_sequences
from distill_pretrain.files.atomic import sha256_file
from tests.support.distributed import REPOSITORY
from tests.support.jobs import SEQ_LEN, run_cli
from tests.support.slow_capture import VOCAB_SIZE, SlowTeacher, capture


def cache_digests(folder: Path) -> dict[str, str]:
    names = [p.name for p in folder.iterdir() if p.name != "recipe.yaml" and p.name[0] != "."]
    return {name: sha256_file(folder / name) for name in names}


def telemetry_of(folder: Path) -> dict[str, list[dict]]:
    """Lines by file."""
    files = sorted(folder.glob(".telemetry/*.jsonl"))
    return {f.name: [json.loads(line) for line in f.read_text().splitlines()] for f in files}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "train"
    stream = np.random.default_rng(3).integers(0, VOCAB_SIZE, 16 * 240)
    with TokenIndexWriter(path, VOCAB_SIZE) as writer:
        for document in np.array_split(stream.astype(np.int64), 9):
            writer.add_document(document)
    return path


def test_replicas_that_die_return_and_join_late_write_the_bytes_of_one(prefix, tmp_path):
    capture(prefix, tmp_path / "whole", SlowTeacher(0.0))
    folder = tmp_path / "cache"
    jobs: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.support.slow_capture", str(prefix), str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        jobs.append(subprocess.Popen([*command, "0.1"], cwd=REPOSITORY, env=environment))
        return jobs[-1]

    def wait_for(condition) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline and all(j.poll() in (None, 0, -9) for j in jobs)
            time.sleep(0.002)

    def half_written() -> list[Path]:
        found = []
        for part in folder.glob("*.part"):
            with contextlib.suppress(FileNotFoundError):
                found += [part] if part.stat().st_size > 256 + 100 else []
        return found

    try:
        victim = start()
        wait_for(half_written)
        victim.kill()
        victim.wait()
        left = [part.name for part in half_written()]
        finished = len(list(folder.glob("*.dpt")))
        assert left and finished < 30 and not (folder / "manifest.json").exists()
        start()  # the killed one again
        start()  # and another
        wait_for(lambda: len(list(folder.glob("*.dpt"))) > finished + 2)
        start()  # a third joins late
        for process in jobs[1:]:
            assert process.wait(timeout=300) == 0
    finally:
        for process in jobs:
            process.kill()
            process.wait()
    assert cache_digests(folder) == cache_digests(tmp_path / "whole")
    lines = telemetry_of(folder)
    print({name: sum(line["num_sequences"] for line in each) for name, each in lines.items()})
    assert len(lines) >= 2
    last = max((line for each in lines.values() for line in each), key=lambda line: line["time"])
    assert last["capture_positions"] == 16 * 240 and last["seconds_in"]["teacher"] > 0


@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_a_teacher_held_by_two_processes_gives_nearly_the_cache_of_one(job, tmp_path, layout):
    """Float rounding depends on the layout; a pipeline computes what one process does."""
    cache = tmp_path / "cache"
    job.run("capture", f"teacher.{layout}=2", f"capture.output_dir={cache}", num_processes=2)
    job.cli("verify", f"data.cache={cache}")
    data = open_sequences(
        DataConfig(tokens=job.tokens / "train", seq_len=SEQ_LEN, num_sequences=40)
    )
    a, b = open_cache(job.cache, data), open_cache(cache, data)
    moved = total = 0
    for sequence in range(40):
        tokens = data.plan.read(np.array([sequence]))[0][0]
        for x, y in zip(
            rows(a.read(sequence, tokens)), rows(b.read(sequence, tokens)), strict=True
        ):
            moved, total = moved + (x != y), total + 1
    print(f"{layout}: positions whose targets moved: {moved} of {total}")
    assert moved <= (0.01 * total if layout == "tensor" else 0)


def rows(targets) -> list[dict[int, int]]:
    ends = np.cumsum(targets.entries_per_token)[:-1]
    parts = zip(np.split(targets.ids, ends), np.split(targets.values, ends), strict=True)
    return [dict(zip(i.tolist(), v.tolist(), strict=True)) for i, v in parts]


def dry(capsys, job, *overrides: str) -> tuple[int, str, str]:
    status = main(["capture", str(job.recipe), "--dry-run", *overrides])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_dry_run_says_what_would_be_done(job, tmp_path, capsys):
    status, said, _ = dry(capsys, job, f"capture.output_dir={tmp_path / 'new'}", "--processes", "3")
    assert status == 0 and not (tmp_path / "new").exists()
    for part in (
        "40 of 64 tokens",
        "4 of 10 sequences",
        "positions 2,560",
        "replicas  3 in 3 processes",
        "systematic, N = 20",
        "captured already: 0 of 40",
        "no problem found",
    ):
        assert part in said
    status, said, _ = dry(capsys, job)
    assert status == 0 and "captured already: 40 of 40" in said
    assert "as in its finished shards" in said


def test_a_dry_run_names_every_problem(job, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps(
            {
                "vocab_size": 100,
                "max_position_embeddings": 32,
                "num_attention_heads": 3,
                "num_hidden_layers": 2,
            }
        )
    )
    layout = [f"teacher.path={model}", "teacher.kind=hf", "teacher.tensor=2", "--processes", "3"]
    status, _, error = dry(capsys, job, *layout, f"capture.output_dir={tmp_path / 'c'}")
    assert status == 2 and "Traceback" not in error
    for part in (
        "3 processes cannot be shared out among copies of 2",
        "the teacher knows 100 ids, the corpus has 512",
        "32 positions",
        "does not divide its 3 attention heads",
        "no weights",
    ):
        assert part in error
    status, _, error = dry(capsys, job, "capture.num_draws=21")
    assert status == 2 and "num_draws: found 20, expected 21" in error
    status, _, error = dry(capsys, job, f"teacher.path={tmp_path}")
    assert status == 2 and "no checkpoint found" in error


def test_a_corpus_tokenised_elsewhere_is_captured(job, tmp_path, capsys):
    """A .bin/.idx pair alone: no tokens.json says where it comes from."""
    for suffix in (".bin", ".idx"):
        shutil.copy(job.tokens / f"train{suffix}", tmp_path / f"foreign{suffix}")
    corpus = [f"data.tokens={tmp_path / 'foreign'}", "data.held_out_tokens=null"]
    cache = [f"capture.output_dir={tmp_path / 'cache'}"]
    assert main(["capture", str(job.recipe), *corpus, *cache]) == 2
    assert "data.vocab_size" in capsys.readouterr().err
    known = [*corpus, "data.vocab_size=512"]
    status, said, _ = dry(capsys, job, *known, *cache)
    assert status == 0 and "tokenizer unknown" in said
    run_cli("capture", str(job.recipe), *known, *cache)
    run_cli("verify", str(job.recipe), *known, f"data.cache={tmp_path / 'cache'}")
    (log,) = telemetry_of(tmp_path / "cache").values()
    assert log[-1]["total_positions"] == 40 * SEQ_LEN and 0 < log[-1]["hit_rate"] <= 1
    assert log[-1]["capture_done"] <= log[-1]["capture_positions"] == 40 * SEQ_LEN
