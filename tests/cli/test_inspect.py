from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from small_cache import SmallCache, upload

from distill_pretrain.cache.codec.hc.codec import HcCodec
from distill_pretrain.cache.finished_shards import FinishedShards
from distill_pretrain.cache.reader import load_plan_of_extent
from distill_pretrain.cache.recompress import recompress_cache
from distill_pretrain.cache.writer import CacheWriter
from distill_pretrain.cli.main import main
from distill_pretrain.corpus.sequence_plan import SequencePlan
from distill_pretrain.corpus.token_index import TokenIndex
from distill_pretrain.data.config import DataConfig
from distill_pretrain.files.storage import open_storage
from distill_pretrain.jobs.inspect.cache import CapturedData, bins


def inspect(path: Path | str, capsys: pytest.CaptureFixture[str], *, status: int = 0) -> str:
    assert main(["inspect", str(path)]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def facts(text: str) -> dict[str, str]:
    return {line[2:24].strip(): line[24:] for line in text.splitlines() if line[:2] == "  "}


def test_cache(small_cache: SmallCache, capsys: pytest.CaptureFixture[str]) -> None:
    text = inspect(small_cache.folder, capsys)
    plan = SequencePlan(TokenIndex.open(small_cache.tokens), seq_len=16, seed=7)
    labels = plan.read(np.arange(5))[1]
    given = labels[labels >= 0]
    shown = facts(text)
    assert shown["state"] == "finished"
    assert shown["sequences"] == "5 of 16 positions"
    assert shown["canary"].startswith(f"{(given % 2 == 0).mean():.1%} of positions")
    size = sum(p.stat().st_size for p in small_cache.folder.glob("*.dpt"))
    assert shown["size"] == f"{size:,} bytes, {size / 80:.2f} per position"
    assert shown["entries"].startswith(
        f"{2 * len(given):,}, {2 * len(given) / 80:.2f} per position"
    )
    assert f"            2  {len(given) / 80:6.1%}" in text
    tokens = plan.read([0])[0][0]
    assert f"after        ids {tokens[:8].tolist()}" in text
    assert f"next token   {labels[0, 7]:>7}" in text


def test_targets_of_a_cache(small_cache: SmallCache, capsys: pytest.CaptureFixture[str]) -> None:
    """Every position with entries has an id drawn 4 times of 6 and one drawn twice."""
    text = inspect(small_cache.folder, capsys)
    shown = facts(text)
    labels = SequencePlan(TokenIndex.open(small_cache.tokens), seq_len=16, seed=7).read(
        np.arange(5)
    )[1]
    entropy = -(4 / 6) * np.log(4 / 6) - (2 / 6) * np.log(2 / 6)
    assert "of the targets in 10 of 10 blocks" in text
    assert shown["mean entropy"].startswith(f"{entropy:.3f} nats, of the sampled counts themselves")
    assert "below the teacher's entropy, and never above ln 6 = 1.792" in shown["mean entropy"]
    assert shown["mean top-1 mass"] == "0.667"
    assert shown["without entries"] == f"{(labels < 0).mean():.1%} of positions"


def test_codec_and_where_the_bytes_go(
    small_cache: SmallCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = facts(inspect(small_cache.folder, capsys))
    size = sum(p.stat().st_size for p in small_cache.folder.glob("*.dpt"))
    entries = int(shown["entries"].partition(",")[0])
    payload = (80 + 2 * entries) / 80  # a length per position, six bits of id and three of count
    assert shown["codec"] == "raw of counts (number 1), no tables"
    assert shown["bytes per position"].startswith(f"{payload:.2f} payload (measured in 10 of 10")
    assert (
        f", {size / 80 - payload:.2f} block heads, index and header"
        in (shown["bytes per position"])
    )
    hc = tmp_path / "hc"
    assert main(["recompress", str(small_cache.folder), str(hc)]) == 0
    capsys.readouterr()
    compact = facts(inspect(hc, capsys))
    (tables,) = hc.glob("codec-*.bin")
    assert compact["codec"] == f"hc of counts (number 3), tables {tables.name[6:18]}"
    assert compact["tables of their own"] == "no shard of 3"
    assert compact["tables"].startswith(f"1, {tables.stat().st_size:,} bytes beside that")
    same = ("state", "entries", "canary", "mean entropy", "mean top-1 mass", "without entries")
    assert {name: compact[name] for name in same} == {name: shown[name] for name in same}


def test_shards_with_tables_of_their_own_are_named(
    small_cache: SmallCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hc = tmp_path / "hc"
    recompress_cache(small_cache.folder, hc, pilot_tokens=1000)
    recompress_cache(small_cache.folder, tmp_path / "narrow", pilot_tokens=1)
    storage = open_storage(tmp_path / "narrow")
    narrow = FinishedShards(storage, load_plan_of_extent(storage))
    writer = CacheWriter.create_or_resume(hc, load_plan_of_extent(open_storage(hc)))
    writer.discard(1)
    codec = narrow.codecs.get(narrow.plan.codec_sha256)
    assert isinstance(codec, HcCodec)
    claimed = writer.claim(1, choose_tables=lambda: codec.tables)
    assert claimed is not None
    with claimed, narrow.open(1) as file:
        for block, frame in enumerate(file.frames(0, claimed.num_blocks)):
            claimed.append_hashed(file.spec.decode(frame, block), frame.token_hash)
        claimed.finish()
    writer.publish_manifest()
    shown = facts(inspect(hc, capsys))
    assert shown["tables of their own"] == "1 of 3 shards: 1"
    assert shown["tables"].startswith("2, ")


def test_a_url_is_described_like_its_folder(
    small_cache: SmallCache, capsys: pytest.CaptureFixture[str]
) -> None:
    url = upload(small_cache.folder, "memory://inspect/cache")
    there, here = inspect(url, capsys), inspect(small_cache.folder, capsys)
    assert there.splitlines()[0] == f"cache {url}"
    assert there.splitlines()[1:] == here.splitlines()[1:]
    assert "no cache here" in inspect("memory://inspect/nothing", capsys, status=2)


def test_unfinished_cache(small_cache: SmallCache, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("manifest.json", "s-000001.json", "recipe.yaml"):
        (small_cache.folder / name).unlink()
    text = inspect(small_cache.folder, capsys)
    assert facts(text)["state"] == "unfinished: 2 of 3 shards done"
    assert "in 6 of 6 blocks" in text
    assert "after" not in text
    for path in small_cache.folder.glob("s-*"):
        path.unlink()
    state = facts(inspect(small_cache.folder, capsys))["state"]
    assert state == "unfinished: 0 of 3 shards done"


def test_a_cache_that_is_being_extended(
    small_cache: SmallCache, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = load_plan_of_extent(open_storage(small_cache.folder)).with_extent(9)
    CacheWriter.create_or_resume(small_cache.folder, plan)
    shown = facts(inspect(small_cache.folder, capsys))
    assert shown["state"] == "5 sequences finished, being extended to 9: 2 of 5 shards done"
    assert shown["sequences"] == "9 of 16 positions"


def test_a_cache_that_lost_a_shard(
    small_cache: SmallCache, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_cache.folder / "s-000000.dpt").unlink()
    text = inspect(small_cache.folder, capsys)
    assert facts(text)["state"] == "damaged: 2 of 3 shards done"
    assert "example: sequence 2," in text


def test_damaged_cache(small_cache: SmallCache, capsys: pytest.CaptureFixture[str]) -> None:
    (small_cache.folder / "plan.json").write_text("{}")
    assert "plan.json cannot be used" in inspect(small_cache.folder, capsys, status=2)


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_tokens(small_cache: SmallCache, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    text = inspect(small_cache.tokens.with_name(f"train{suffix}"), capsys)
    shown = facts(text)
    index = TokenIndex.open(small_cache.tokens)
    assert shown["documents"] == "4"
    assert shown["tokens"].startswith("75 ")
    assert shown["tokens per document"].startswith("shortest 7, ")
    assert shown[".bin sha256"] == index.fingerprint.bin_sha256
    assert shown["begins with"] == f"ids {index.read(0, 0, 20).tolist()}"
    assert "warning" not in shown
    assert inspect(small_cache.tokens.parent, capsys) == text


def test_changed_tokens_are_noted(
    small_cache: SmallCache, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_cache.tokens.with_name("train.bin")
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    assert "changed" in facts(inspect(small_cache.tokens, capsys))["warning"]


def make_run(folder: Path) -> Path:
    step = folder / "checkpoints" / "step-00000002"
    step.mkdir(parents=True)
    (step / "weights").write_bytes(b"1234")
    record = {
        "step": 2,
        "identity": {"model": {"arch": "llama", "num_layers": 3}, "seq_len": 16},
        "files": {"weights": "0" * 64},
    }
    (step / "checkpoint.json").write_text(json.dumps(record))
    (folder / "checkpoints" / "step-00000003.tmp").mkdir()
    row = {"loss": 5.25, "ce": 5.5, "kl": None, "grad_norm": 1.0, "lr": 0.1, "tokens": 4096}
    rows = [{"step": n, **row, "tokens_per_second": 12345.6, "seconds": 1.0} for n in (1, 2)]
    text = "".join(json.dumps(r) + "\n" for r in rows)
    (folder / "metrics.jsonl").write_text(text + '{"step": 3, "lo')
    return folder


def test_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = facts(inspect(make_run(tmp_path / "run"), capsys))
    assert shown["last step"] == "2"
    assert shown["ce"] == "5.5"
    assert shown["tokens"] == "4,096"
    assert "kl" not in shown
    assert "incomplete" in shown["note"]
    assert shown["checkpoints"] == "step-00000002"
    assert shown["model"] == "arch llama, num_layers 3"


def test_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run") / "checkpoints" / "step-00000002"
    shown = facts(inspect(folder, capsys))
    assert shown["step"] == "2"
    assert shown["model"] == "arch llama, num_layers 3"
    assert shown["seq_len"] == "16"


def test_nothing_that_is_inspected_loads_torch_or_checks_recipes(
    small_cache: SmallCache, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    paths = [small_cache.folder, small_cache.tokens, small_cache.tokens.parent, run]
    code = (
        "import sys\n"
        "from distill_pretrain.cli.main import main\n"
        "codes = [main(['inspect', path]) for path in sys.argv[1:]]\n"
        "loaded = [name for name in ('torch', 'megatron', 'pydantic') if name in sys.modules]\n"
        "sys.exit(f'{codes}, loaded {loaded}' if any(codes) or loaded else 0)\n"
    )
    command = [sys.executable, "-c", code, *map(str, paths), str(run / "checkpoints/step-00000002")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_read_of_a_captures_recipe_has_the_defaults_of_the_section() -> None:
    for field in fields(CapturedData):
        default = DataConfig.model_fields[field.name].get_default()
        if field.name in ("tokens", "seq_len"):
            assert DataConfig.model_fields[field.name].is_required()
        else:
            assert field.default == default, field.name


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        {"tokens": None, "seq_len": 16},
        {"tokens": "a\0b/c", "seq_len": 16},
        {"tokens": "x" * 300, "seq_len": 16},
        {"tokens": "no/such/folder", "seq_len": 16},
        {"tokens": "{tokens}", "seq_len": "16"},
        {"tokens": "{tokens}", "seq_len": 16, "seed": [7]},
        {"tokens": "{tokens}", "seq_len": 16, "seed": 7, "packing": {}},
        {"tokens": "{tokens}", "seq_len": 16, "seed": 7, "documents": []},
        {"tokens": "{tokens}", "seq_len": 16, "seed": 8},
        {"tokens": "{tokens}"},
    ],
)
def test_a_cache_whose_recipe_leads_to_no_corpus_is_described_without_its_text(
    data: Any, small_cache: SmallCache, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(data, dict) and data.get("tokens") == "{tokens}":
        data = {**data, "tokens": str(small_cache.tokens)}
    path = small_cache.folder / "recipe.yaml"
    path.chmod(0o644)
    path.write_text(yaml.safe_dump({"data": data}))
    text = inspect(small_cache.folder, capsys)
    assert "example: sequence 0" in text and "after" not in text


def test_the_recipe_of_a_cache_is_read_once(
    small_cache: SmallCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, loads = yaml.load, []
    monkeypatch.setattr(yaml, "load", lambda *a, **k: loads.append(k["Loader"]) or read(*a, **k))
    assert main(["inspect", str(small_cache.folder)]) == 0
    assert loads == [getattr(yaml, "CSafeLoader", yaml.SafeLoader)]


def test_anything_else_says_what_was_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path, found in ((Path(), "an empty folder"), (tmp_path / "no", "no such file or folder")):
        error = inspect(path, capsys, status=2)
        assert found in error
        for name in ("plan.json", ".idx", "tokens.json", "metrics.jsonl", "checkpoint.json"):
            assert name in error


def test_histogram_bins_cover_every_count_once() -> None:
    for size in (2, 7, 51, 1025):
        counts = np.ones(size, np.int64)
        found = bins(counts)
        assert [low for low, _, _ in found] == [0, *(high + 1 for _, high, _ in found[:-1])]
        assert found[-1][1] == size - 1
        assert sum(share for _, _, share in found) == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--draws", "0"], "--draws"),
        (["--draws", "12,2000"], "--draws"),
        (["--top-p", "1.0"], "--top-p"),
        (["--sequences", "0"], "--sequences"),
        ([], "no data, teacher, capture"),
        (["capture.smapler=topk"], "smapler"),
    ],
)
def test_estimators_that_cannot_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], named: str
) -> None:
    (tmp_path / "empty.yaml").write_text("{}\n")
    assert main(["inspect", "--estimators", str(tmp_path / "empty.yaml"), *options]) == 2
    error = capsys.readouterr().err
    assert named in error and "Traceback" not in error


def test_an_output_that_cannot_be_written_is_found_before_the_teacher_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "note").write_text("")
    (tmp_path / "capture.yaml").write_text(
        "data: {tokens: nowhere, vocab_size: 64, seq_len: 16}\n"
        "teacher: {kind: hf, path: nowhere}\n"
        "capture: {output_dir: nowhere, num_draws: 4}\n"
    )
    output = ["--output", str(tmp_path / "note" / "figures.json")]
    assert main(["inspect", "--estimators", str(tmp_path / "capture.yaml"), *output]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "note") in error and "nowhere" not in error and "Traceback" not in error


def test_settings_without_estimators_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path), "teacher.path=x"]) == 2
    assert "--estimators" in capsys.readouterr().err
