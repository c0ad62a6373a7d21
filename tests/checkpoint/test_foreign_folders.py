"""Checkpoints of an older version go on; damaged and crafted ones are refused, and run no code."""

from __future__ import annotations

import io
import json
import lzma
import os
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill_pretrain.cli.main import main
from distill_pretrain.corpus.token_writer import TokenIndexWriter
from distill_pretrain.errors import CheckpointError
from distill_pretrain.files.atomic import sha256_file
from distill_pretrain.mcore.student.unpickling import METADATA, check_pickles
from distill_pretrain.processes.process import process_group
from tests.support.jobs import run_cli

OLD = Path(__file__).with_name("step_2_of_e9e8889.tar.xz")
"""Made by commit e9e8889 with the recipe below: checkpoints/step-00000002 of 4 steps."""
LATER_LOSSES = {3: 5.00741720199585, 4: 5.091982364654541}
"""Of its steps 3 and 4, by the same commit."""
FILES = [METADATA, "__0_0.distcp", "__0_1.distcp", "common.pt", "metadata.json", "rng-00000.pt"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("tokens") / "train"
    ids = np.arange(200, dtype=np.int64)
    with TokenIndexWriter(prefix, 60) as writer:
        for document in np.array_split((ids * ids * 7 + ids) % 60, 5):
            writer.add_document(document)
    return prefix


@pytest.fixture
def run(tmp_path) -> Path:
    """The run folder that commit e9e8889 left."""
    folder = tmp_path / "run"
    step = folder / "checkpoints" / "step-00000002"
    step.mkdir(parents=True)
    with lzma.open(OLD) as raw, tarfile.open(fileobj=raw) as archive:
        archive.extractall(step, filter="data")
    return folder


def training(tokens: Path, run: Path, *overrides: str) -> list[str]:
    sizes = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2}
    return [
        "train",
        f"data.tokens={tokens}",
        "data.seq_len=8",
        "data.vocab_size=60",
        *(f"model.{key}={value}" for key, value in sizes.items()),
        "model.vocab_divisor=4",
        "model.init=deepscale",
        "optimizer.lr=0.01",
        "train.steps=4",
        "train.global_batch_size=2",
        "train.checkpoint_interval=2",
        "train.threads=1",
        f"train.output_dir={run}",
        *overrides,
    ]


def losses(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in lines}


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def correct_hashes(folder: Path) -> None:
    """Record the files of a checkpoint as they are now, as whoever changed them would."""
    record = json.loads((folder / "checkpoint.json").read_text())
    record["files"] = {name: sha256_file(folder / name) for name in record["files"]}
    (folder / "checkpoint.json").write_text(json.dumps(record))


def test_a_checkpoint_of_an_older_version_is_resumed_and_exported(tokens, run, tmp_path, capsys):
    run_cli("export", str(run), str(tmp_path / "out"), "--tokenizer", "none")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 2000
    assert main(training(tokens, run, "train.steps=9", "model.dropout=0.1")) == 2
    error = capsys.readouterr().err
    assert "model.dropout: checkpoint 0.0, this run 0.1" in error
    assert "train.steps (the length" in error and "checkpoint 4, this run 9" in error
    run_cli(*training(tokens, run))
    said = capsys.readouterr().err
    assert "resumed at step 2" in said and "start anew" not in said
    assert losses(run) == pytest.approx(LATER_LOSSES, abs=1e-6)
    # Its checkpoints are of this version now.
    run_cli(*training(tokens, run))
    assert "already trained" in capsys.readouterr().err


class Evil:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


def crafted(mark: Path) -> dict[str, bytes]:
    zipped = io.BytesIO()
    torch.save({"x": Evil(mark)}, zipped)
    return {"plain": pickle.dumps(Evil(mark)), "of torch": zipped.getvalue()}


def test_no_file_of_a_checkpoint_runs_code(tokens, run, tmp_path, capsys):
    mark = tmp_path / "mark"
    for form, content in crafted(mark).items():
        for name in [*FILES, "checkpoint.json"]:
            copy = tmp_path / f"{form} {name}"
            shutil.copytree(run, copy)
            (newest(copy) / name).write_bytes(content)
            if name != "checkpoint.json":
                correct_hashes(newest(copy))
            read_at_export = (
                [] if name == "rng-00000.pt" else [["export", str(copy), str(tmp_path / "out")]]
            )
            for command in [*read_at_export, training(tokens, copy)]:
                assert main(command) == 2, (form, name, command[0])
                error = capsys.readouterr().err
                assert "Traceback" not in error and "step-00000002" in error, (form, name)
                assert not mark.exists(), (form, name, command[0])
    (newest(run) / METADATA).write_bytes(crafted(mark)["plain"])
    correct_hashes(newest(run))
    with process_group(), pytest.raises(CheckpointError, match=r"names posix\.mkdir"):
        score(run)
    assert not mark.exists()


def score(run: Path) -> None:
    """As `eval` and a teacher load a student."""
    from distill_pretrain.checkpoint.store import find_checkpoint
    from distill_pretrain.checkpoint.whole import load_whole_model
    from distill_pretrain.mcore.model.config import ParallelConfig
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    with model_parallel(ParallelConfig(), seed=0):
        load_whole_model(find_checkpoint(run), precision="fp32")


def changed_metadata(folder: Path, change: Any) -> None:
    found = pickle.loads((folder / METADATA).read_bytes())
    change(found)
    (folder / METADATA).write_bytes(pickle.dumps(found))


def test_what_hides_in_the_metadata_is_refused(run, tmp_path):
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    folder, mark = newest(run), tmp_path / "mark"
    sound = (folder / METADATA).read_bytes()
    assert "output_layer.weight" in check_pickles(folder)

    def evil_value(found: Any) -> None:
        found.planner_data = Evil(mark)

    def evil_object(found: Any) -> None:
        # Tensors are read with limits, objects are not.
        index, info = next(iter(found.storage_data.items()))
        found.state_dict_metadata[index.fqn] = BytesStorageMetadata()
        (folder / "objects").write_bytes(pickle.dumps(Evil(mark), protocol=2))
        info.relative_path, info.offset, info.length = "objects", 0, 10**3
        info.length = (folder / "objects").stat().st_size

    def elsewhere(found: Any) -> None:
        next(iter(found.storage_data.values())).relative_path = "../outside"

    def beyond_the_end(found: Any) -> None:
        next(iter(found.storage_data.values())).offset = 10**9

    for change in (evil_value, evil_object, elsewhere, beyond_the_end):
        changed_metadata(folder, change)
        with pytest.raises(CheckpointError, match="cannot be read"):
            check_pickles(folder)
        assert not mark.exists(), change
        (folder / METADATA).write_bytes(sound)


def test_a_checkpoint_of_a_torch_that_describes_tensors_more_closely_goes_on(
    run, tokens, monkeypatch
):
    """torch 2.15 and later add the strides, which 2.6 to 2.14 do not know."""
    from torch.distributed.checkpoint.metadata import TensorProperties

    written = TensorProperties.__getstate__
    with monkeypatch.context() as newer:
        newer.setattr(TensorProperties, "__getstate__", lambda self: (*written(self)[:5], (8, 1)))
        found = pickle.loads((newest(run) / METADATA).read_bytes())
        (newest(run) / METADATA).write_bytes(pickle.dumps(found))
    correct_hashes(newest(run))
    restored = TensorProperties.__setstate__
    run_cli(*training(tokens, run))
    assert losses(run) == pytest.approx(LATER_LOSSES, abs=3e-7)
    assert TensorProperties.__setstate__ is restored


def test_names_that_newer_and_older_versions_write_are_known(run):
    """Enumerations by getattr (Python 3.11.0), paths (torch's own writer) and objects (other planners)."""
    import pathlib

    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
    from torch.distributed.checkpoint.planner import SavePlan

    class ByName:
        def __reduce__(self) -> tuple[Any, ...]:
            return getattr, (_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")

    class ForeignAttribute:
        def __reduce__(self) -> tuple[Any, ...]:
            return getattr, (torch.Size, "mro")

    def known(found: Any) -> None:
        found.planner_data = [ByName(), pathlib.PosixPath("x"), SavePlan([])]
        found.planner_data += [torch.bfloat16, torch.strided, torch.Size([1])]

    def unknown(found: Any) -> None:
        found.planner_data = ForeignAttribute()

    changed_metadata(newest(run), known)
    check_pickles(newest(run))
    changed_metadata(newest(run), unknown)
    with pytest.raises(CheckpointError, match="getattr"):
        check_pickles(newest(run))


@pytest.mark.parametrize("damage", ["empty", "half", "garbage"])
def test_damaged_files_whose_hash_is_right_are_refused(tokens, run, tmp_path, capsys, damage):
    for name in FILES:
        copy = tmp_path / name
        shutil.copytree(run, copy)
        path = newest(copy) / name
        sound = path.read_bytes()
        cut = {"empty": b"", "half": sound[: len(sound) // 2], "garbage": b"\x93" * len(sound)}
        path.write_bytes(cut[damage])
        correct_hashes(newest(copy))
        verb = training(tokens, copy) if name == "rng-00000.pt" else None
        status = main(verb or ["export", str(copy), str(tmp_path / "out"), "--tokenizer", "none"])
        error = capsys.readouterr().err
        assert status == 2 and "Traceback" not in error and str(newest(copy)) in error, (
            name,
            error,
        )


@pytest.mark.parametrize("damaged", ["progress", "identity"])
def test_a_record_that_lacks_its_parts_is_refused(tokens, run, tmp_path, capsys, damaged):
    path = newest(run) / "checkpoint.json"
    record = json.loads(path.read_text())
    record[damaged] = {}
    path.write_text(json.dumps(record))
    verb = (
        training(tokens, run)
        if damaged == "progress"
        else ["export", str(run), str(tmp_path / "out")]
    )
    assert main(verb) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and "record is damaged" in error
