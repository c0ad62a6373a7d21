"""Capture through the command line: the same bytes whoever writes them, however often they were killed."""

from __future__ import annotations

import contextlib
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from distill_pretrain.cli.main import main
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import open_cache, open_sequences
from distill_pretrain.files.atomic import sha256_file
from tests.support.jobs import SEQ_LEN, kill_all


def cache_bytes(folder: Path) -> dict[str, str]:
    """sha256 by name of what a cache consists of; a kill may leave a hidden temporary file, which is not."""
    names = [p.name for p in folder.iterdir() if p.name != "recipe.yaml" and p.name[0] != "."]
    assert not [n for n in names if n.endswith((".part", ".bad"))]
    return {name: sha256_file(folder / name) for name in names}


def folder_bytes(folder: Path) -> int:
    """What a folder holds, while others write to it: a temporary file may go between listing and asking."""
    total = 0
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def data_config(job) -> DataConfig:
    return DataConfig(tokens=job.tokens / "train", seq_len=SEQ_LEN, num_sequences=40)


def test_two_processes_write_the_bytes_of_one(job, tmp_path):
    job.run("capture", f"capture.output_dir={tmp_path}", num_processes=2)
    assert cache_bytes(tmp_path) == cache_bytes(job.cache)


@pytest.mark.slow
def test_a_killed_capture_resumes_to_the_same_bytes(job, tmp_path):
    kills = 0
    chance = random.Random(0)
    for number in range(3):
        process = job.start(
            "capture", f"capture.output_dir={tmp_path}", num_processes=1 + number % 2
        )
        deadline = time.monotonic() + 60
        before = folder_bytes(tmp_path)
        while process.poll() is None and time.monotonic() < deadline:
            if folder_bytes(tmp_path) > before + chance.randrange(2000, 8000):
                kill_all(process)
                kills += 1
                break
            time.sleep(0.001)
        process.wait()
    assert kills >= 1, "no run was killed while it was writing"
    job.cli("capture", f"capture.output_dir={tmp_path}")
    assert cache_bytes(tmp_path) == cache_bytes(job.cache)


def test_a_finished_capture_is_left_alone(job):
    before = {p: p.stat().st_mtime_ns for p in job.cache.glob("s-*")}
    job.cli("capture")
    assert {p: p.stat().st_mtime_ns for p in job.cache.glob("s-*")} == before


def test_the_cache_says_what_the_teacher_says(job):
    """The stored counts are the sampler's on the teacher's own logits, position by position."""
    import torch

    from distill_pretrain.mcore.model.config import ParallelConfig
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.processes.process import process_group
    from distill_pretrain.teacher.engines import open_engine

    data = open_sequences(data_config(job))
    cache = open_cache(job.cache, data)
    with process_group(), model_parallel(ParallelConfig(), seed=0):
        engine = open_engine(
            "megatron", job.teacher, "fp32", vocab_size=data.vocab_size, seq_len=SEQ_LEN
        )
        tokens, labels = data.plan.read(np.arange(8, 12))
        logits = engine.logits(torch.from_numpy(tokens.astype(np.int64))).double()
    probs = torch.softmax(logits, -1).numpy()
    for row, sequence in enumerate(range(8, 12)):
        targets = cache.read(sequence, tokens[row])
        position = np.repeat(np.arange(SEQ_LEN), targets.entries_per_token)
        expected = 20 * probs[row, position, targets.ids]
        assert (np.abs(targets.values - expected) < 1 + 1e-3).all()  # systematic: floor or ceil
        assert targets.values.sum() == 20 * (labels[row] >= 0).sum()


@pytest.mark.slow
def test_a_cache_of_two_teachers_has_draws_from_the_mean_of_their_distributions(job, tmp_path):
    import torch

    from distill_pretrain.mcore.model.config import ParallelConfig
    from distill_pretrain.mcore.runtime.parallel import model_parallel
    from distill_pretrain.processes.process import process_group
    from distill_pretrain.teacher.engines import open_engine

    other, folder = tmp_path / "other", tmp_path / "cache"
    job.cli("train", f"train.output_dir={other}", "train.steps=12", "train.seed=5")
    mixed = f"teacher.mixture=[{{path: {other}, weight: 3}}]"
    job.run("capture", f"capture.output_dir={folder}", mixed, num_processes=2)
    data = open_sequences(data_config(job))
    cache = open_cache(folder, data)
    assert [one["share"] for one in cache.plan.teacher["teachers"]] == [0.25, 0.75]
    tokens, _ = data.plan.read(np.arange(8, 12))
    probs = 0.0
    with process_group(), model_parallel(ParallelConfig(), seed=0):
        for share, path in ((0.25, job.teacher), (0.75, other)):
            engine = open_engine(
                "megatron", path, "fp32", vocab_size=data.vocab_size, seq_len=SEQ_LEN
            )
            logits = engine.logits(torch.from_numpy(tokens.astype(np.int64))).double()
            probs = probs + share * torch.softmax(logits, -1).numpy()
    for row, sequence in enumerate(range(8, 12)):
        targets = cache.read(sequence, tokens[row])
        position = np.repeat(np.arange(SEQ_LEN), targets.entries_per_token)
        expected = 20 * probs[row, position, targets.ids]
        assert (np.abs(targets.values - expected) < 1 + 1e-3).all()  # systematic: floor or ceil
    assert main(["capture", str(job.recipe), f"capture.output_dir={folder}"]) == 2


def rows(targets: RaggedTargets) -> list[dict[int, int]]:
    """Count by id of every position; the two caches have tables, and so an order of ids, of their own."""
    ends = np.cumsum(targets.entries_per_token)[:-1]
    parts = zip(np.split(targets.ids, ends), np.split(targets.values, ends), strict=True)
    return [dict(zip(i.tolist(), v.tolist(), strict=True)) for i, v in parts]


def test_another_micro_batch_shape_moves_few_targets(job, tmp_path):
    """Float rounding of the teacher depends on the batch shape; the share of moved targets is small."""
    job.cli("capture", f"capture.output_dir={tmp_path}", "capture.micro_batch_size=3")
    data = open_sequences(data_config(job))
    a, b = open_cache(job.cache, data), open_cache(tmp_path, data)
    assert a.plan.plan_id != b.plan.plan_id
    moved = total = 0
    for sequence in range(40):
        tokens = data.plan.read(np.array([sequence]))[0][0]
        pairs = zip(rows(a.read(sequence, tokens)), rows(b.read(sequence, tokens)), strict=True)
        different = [x != y for x, y in pairs]
        moved, total = moved + sum(different), total + len(different)
    assert moved / total < 0.01
    print(f"positions whose targets moved: {moved} of {total}")


@pytest.mark.parametrize("sampler", ["multinomial", "topk", "topp"])
def test_a_student_trains_from_every_kind_of_target(job, tmp_path, sampler):
    cache = tmp_path / "cache"
    top_p = ["capture.top_p=0.9"] if sampler == "topp" else []
    job.cli("capture", f"capture.output_dir={cache}", f"capture.sampler={sampler}", *top_p)
    job.cli("verify", f"data.cache={cache}")
    run = tmp_path / "run"
    kd = ["objective.ce_weight=0.0", "objective.kd_weight=1.0"]
    job.cli("train", f"data.cache={cache}", *kd, f"train.output_dir={run}")
    import json

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["kl"] < records[0]["kl"] - 0.3


SETS = {
    "rs": ["capture.num_draws=20"],
    "paper": ["capture.sampler=multinomial", "capture.num_draws=9", "capture.seed=3"],
    "head": ["capture.sampler=topp", "capture.top_p=0.8", "capture.num_draws=16"],
}
SETS_KEYS = [
    "capture.num_draws=50",  # the default; the recipe has another
    "capture.sets={rs: {num_draws: 20}, paper: {sampler: multinomial, num_draws: 9, seed: 3}, "
    "head: {sampler: topp, top_p: 0.8, num_draws: 16}}",
]


@pytest.fixture(scope="module")
def caches_alone(job, tmp_path_factory) -> dict[str, dict[str, str]]:
    """Bytes of every set of SETS captured on its own."""
    folder = tmp_path_factory.mktemp("alone")
    for name, keys in SETS.items():
        job.cli("capture", f"capture.output_dir={folder / name}", *keys)
    return {name: cache_bytes(folder / name) for name in SETS}


def test_several_sets_from_one_pass_are_the_caches_of_captures_of_their_own(
    job, tmp_path, caches_alone, capsys
):
    job.cli("capture", f"capture.output_dir={tmp_path}", *SETS_KEYS)
    captured = capsys.readouterr()
    assert captured.err.count("scoring a pilot") == 1
    assert captured.out.count("cache complete") == 3
    assert {p.name: cache_bytes(p) for p in tmp_path.iterdir()} == caches_alone
    assert caches_alone["rs"] == cache_bytes(job.cache)
    for name in SETS:
        job.cli("verify", f"data.cache={tmp_path / name}")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/s-*")}
    job.cli("capture", f"capture.output_dir={tmp_path}", *SETS_KEYS)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_set_joins_those_that_are_there(job, tmp_path, caches_alone):
    job.cli("capture", f"capture.output_dir={tmp_path / 'paper'}", *SETS["paper"])
    job.cli("capture", f"capture.output_dir={tmp_path}", *SETS_KEYS)
    assert {p.name: cache_bytes(p) for p in tmp_path.iterdir()} == caches_alone


def test_captures_run_inside_a_process_group_that_exists(job, tmp_path, caches_alone):
    """What a comparison does: recipes built in memory, one after another, in one initialised process."""
    from distill_pretrain.config import load_recipe
    from distill_pretrain.jobs.capture import capture_caches
    from distill_pretrain.jobs.recipe import Recipe
    from distill_pretrain.processes.process import process_group

    with process_group():
        for number in range(2):
            keys = [f"capture.output_dir={tmp_path / str(number)}", *SETS_KEYS]
            capture_caches(load_recipe(Recipe, job.recipe, keys))
    for number in range(2):
        found = {p.name: cache_bytes(p) for p in (tmp_path / str(number)).iterdir()}
        assert found == caches_alone


@pytest.mark.slow
def test_a_killed_capture_of_sets_by_two_processes_resumes_to_the_same_bytes(
    job, tmp_path, caches_alone
):
    def size() -> int:
        return sum(folder_bytes(p) for p in tmp_path.iterdir())

    process = job.start("capture", f"capture.output_dir={tmp_path}", *SETS_KEYS, num_processes=2)
    before, deadline = size(), time.monotonic() + 120
    # Beyond tables and plans, before the end.
    while process.poll() is None and time.monotonic() < deadline:
        if any(tmp_path.glob("*/s-*")) and size() > before + 30000:
            break
        time.sleep(0.001)
    assert process.poll() is None, "the run was not killed while it was writing"
    kill_all(process)
    assert any(not (tmp_path / name / "manifest.json").exists() for name in SETS)
    job.run("capture", f"capture.output_dir={tmp_path}", *SETS_KEYS, num_processes=2)
    assert {p.name: cache_bytes(p) for p in tmp_path.iterdir()} == caches_alone


def test_settings_beside_sets_are_refused(job, capsys):
    error = refused(job, capsys, SETS_KEYS[1], verb="capture")
    assert "num_draws given beside sets" in error
    error = refused(job, capsys, "capture.sets={a: {smapler: topk}}", verb="capture")
    assert "smapler" in error
    error = refused(job, capsys, "capture.sampler=topp", verb="capture")
    assert "top_p=0.9" in error


def test_estimators_are_measured_on_the_recipe_s_teacher(job, tmp_path, capsys):
    import json

    from tests.support.jobs import run_cli

    output = tmp_path / "figures.json"
    options = ["--sequences", "8", "--draws", "4,20", "--top-p", "0.5", "--output", str(output)]
    run_cli("inspect", "--estimators", str(job.recipe), "capture.seed=8", *options)
    printed = capsys.readouterr().out
    for shown in (
        "systematic 20",
        "topp 0.5 (<= 20)",
        "N = 4 ",
        "micro-batches of 16 instead of 4",
    ):
        assert shown in printed
    found = json.loads(output.read_text())
    names = [(f["sampler"]["name"], f["sampler"]["num_draws"]) for f in found["samplers"]]
    sampled = [(name, n) for name in ("multinomial", "systematic", "topk") for n in (4, 20)]
    assert names == [*sampled, ("topp", 20)]
    assert found["positions"] == 8 * SEQ_LEN and found["teacher"]["kind"] == "megatron"
    assert all(ratio["at_equal_draws"] > 1 for ratio in found["ratios"])


def refused(job, capsys, *overrides: str, verb: str = "train") -> str:
    status = main([verb, str(job.recipe), "objective.kd_weight=1.0", *overrides])
    error = capsys.readouterr().err
    assert status == 2 and "Traceback" not in error
    return error


def from_cache(cache: Path, run: Path) -> list[str]:
    return [f"data.cache={cache}", f"train.output_dir={run / 'run'}"]


@pytest.fixture(scope="module")
def other_corpus(tmp_path_factory):
    """Another text, tokenised with a tokenizer of its own, and with the first corpus's tokenizer."""
    import json as package

    from tests.support.jobs import run_cli

    def make(*tokenizer: str) -> Path:
        folder = tmp_path_factory.mktemp("other")
        run_cli(
            "tokenize",
            f"corpus.paths=[{Path(package.__file__).parent}]",
            "corpus.include=['*.py']",
            "corpus.held_out_fraction=0.2",
            f"corpus.output_dir={folder}",
            *tokenizer,
        )
        return folder

    return make


@pytest.mark.parametrize(
    ("tokenizer", "named"),
    [
        ("tokenizer.path={tokens}/tokenizer.model", "corpus"),
        ("tokenizer.vocab_size=500", "tokenizer"),
    ],
)
def test_a_cache_of_another_corpus_or_tokenizer_is_refused(
    job, capsys, tmp_path, other_corpus, tokenizer, named
):
    tokens = other_corpus(tokenizer.format(tokens=job.tokens))
    changed = [f"data.tokens={tokens / 'train'}", "data.num_sequences=10"]
    error = refused(job, capsys, *changed, *from_cache(job.cache, tmp_path))
    assert f"another {named}" in error
    assert ("another tokenizer" in error) == (named == "tokenizer")


def test_a_teacher_of_another_tokenizer_is_refused(job, capsys, tmp_path, other_corpus):
    tokens = other_corpus("tokenizer.vocab_size=500")
    error = refused(
        job,
        capsys,
        f"data.tokens={tokens / 'train'}",
        "data.num_sequences=10",
        f"capture.output_dir={tmp_path / 'cache'}",
        verb="capture",
    )
    assert "vocabulary" in error and str(job.teacher) in error
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("data.seq_len=32", "another seq_len: "),
        ("data.seed=7", "another order of documents"),
        ("data.num_sequences=41", "the cache has 40, the run needs 41"),
    ],
)
def test_a_cache_of_another_plan_is_refused(job, capsys, tmp_path, changed, expected):
    assert expected in refused(job, capsys, changed, *from_cache(job.cache, tmp_path))


def test_an_unfinished_cache_is_refused(job, capsys, tmp_path):
    broken = tmp_path / "cache"
    shutil.copytree(job.cache, broken)
    (broken / "manifest.json").unlink()
    error = refused(job, capsys, *from_cache(broken, tmp_path))
    assert "not finished" in error or "incomplete" in error


def test_a_flipped_byte_stops_training_and_verify_names_the_shard(job, capsys, tmp_path):
    broken = tmp_path / "cache"
    shutil.copytree(job.cache, broken)
    victim = broken / "s-000002.dpt"
    data = bytearray(victim.read_bytes())
    data[len(data) // 3] ^= 0x10
    victim.write_bytes(data)
    error = refused(job, capsys, *from_cache(broken, tmp_path))
    assert "shard 2" in error or "s-000002" in error
    error = refused(job, capsys, f"data.cache={broken}", verb="verify")
    assert "s-000002" in error or "shard 2" in error


def test_another_sampler_may_not_be_mixed_into_a_cache(job, capsys):
    error = refused(job, capsys, "capture.num_draws=21", verb="capture")
    assert "num_draws" in error and "20" in error and "21" in error


def test_a_second_cache_takes_the_tables_of_the_first(job, capsys, tmp_path):
    (tables,) = job.cache.glob("codec-*.bin")
    given = f"capture.codec_tables={tables}"
    job.cli("capture", given, f"capture.output_dir={tmp_path / 'same'}")
    assert cache_bytes(tmp_path / "same") == cache_bytes(job.cache)
    job.cli("capture", given)
    other = tmp_path / "other"
    seed = "capture.seed=7"
    job.cli("capture", seed, f"capture.output_dir={other}")
    (others,) = other.glob("codec-*.bin")
    assert others.name != tables.name
    before = cache_bytes(other)
    error = refused(job, capsys, given, seed, f"capture.output_dir={other}", verb="capture")
    assert f"codec_sha256: found {others.stem[6:]!r}, expected {tables.stem[6:]!r}" in error
    assert cache_bytes(other) == before
    error = refused(job, capsys, given, "capture.codec=raw", verb="capture")
    assert "capture.codec_tables" in error and "capture.codec" in error.replace("codec_tables", "")


def test_nan_logits_stop_the_capture_and_name_the_sequence(job, tmp_path, monkeypatch, capsys):
    from distill_pretrain.teacher.engines.megatron import MegatronEngine

    sound = MegatronEngine.chunks
    calls = []

    def failing(self, tokens):
        calls.append(1)
        for chunk in sound(self, tokens):
            if (
                len(calls) == 6
            ):  # after the pilot: shard 1, its second micro-batch, sequences 14 to 17
                chunk.logits[1 * SEQ_LEN + 7, 3] = float("nan")
            yield chunk

    monkeypatch.setattr(MegatronEngine, "chunks", failing)
    error = refused(job, capsys, f"capture.output_dir={tmp_path}", verb="capture")
    assert "sequence 15" in error and "finite" in error
    monkeypatch.undo()
    job.cli("capture", f"capture.output_dir={tmp_path}")
    assert cache_bytes(tmp_path) == cache_bytes(job.cache)
