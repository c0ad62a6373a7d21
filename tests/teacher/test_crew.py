"""Several processes hold one teacher: one cache, the bytes of one process, and errors that reach every rank."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distill_pretrain.contracts import Replica
from distill_pretrain.corpus.token_writer import TokenIndexWriter
from distill_pretrain.errors import CacheError, ConfigError, TeacherError
from distill_pretrain.kernels.cuda.backend import KernelsUnavailable
from distill_pretrain.kernels.teacher_sampling import SOURCE
from distill_pretrain.processes.process import process_group
from distill_pretrain.sampling.host import host_columns
from distill_pretrain.teacher import capture as job
from distill_pretrain.teacher import sampling_backend
from distill_pretrain.teacher.sampling_backend import ReadColumns, device_reader
from tests.support.distributed import run_distributed
from tests.support.emulation import emulated
from tests.support.slow_capture import VOCAB_SIZE, SlowTeacher, capture


def digests(folder: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.iterdir()
        if p.name[0] != "."
    }


def capture_in_all_ways(prefix: str, folder: str) -> list[dict[str, Any]]:
    """On four ranks: two replicas of two, one of four, and failures of the leader; what each rank saw."""
    root = Path(folder)
    with process_group():
        rank = dist.get_rank()
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        half = slice((rank % 2) * VOCAB_SIZE // 2, (rank % 2 + 1) * VOCAB_SIZE // 2)
        # Led by its last rank, as a pipeline is.
        pair = Replica(
            group=pairs[rank // 2],
            vocab_group=pairs[rank // 2],
            leader=rank // 2 * 2 + 1,
            number=rank // 2,
            count=2,
        )
        seen: dict[str, Any] = {}
        capture(Path(prefix), root / "pairs", SlowTeacher(0.0, pair, half))
        capture(Path(prefix), root / "kernels", SlowTeacher(0.0, pair, half), read=_emulated())
        seen["led"] = pair.is_leader
        seen["reader"] = _reader_where_one_rank_has_no_kernels(pair)
        for name, fail in {"disk": _disk_full, "bug": _bug, "logits": None}.items():
            teacher = SlowTeacher(0.0, pair, half)
            if fail is None:
                teacher = _NotFinite(0.0, pair, half)
            elif pair.is_leader:
                job._append_batch = fail
            try:
                capture(Path(prefix), root / name, teacher)
                seen[name] = "nothing"
            except Exception as error:
                seen[name] = f"{type(error).__name__}: {error}"
            job._append_batch = _SOUND
            dist.barrier()
        everyone: list[Any] = [None] * 4
        dist.all_gather_object(everyone, seen)
    return everyone


def _emulated() -> ReadColumns:
    return device_reader(emulated(SOURCE))


def _reader_where_one_rank_has_no_kernels(replica: Replica) -> list[Any]:
    """Whether this rank samples on the host, how often it warned, and whether "cuda" is refused."""

    def launcher_for(source: Any, device: Any) -> Any:
        if dist.get_rank() == 2:
            raise KernelsUnavailable("no compiler")
        return emulated(source)

    sampling_backend.launcher_for, device = launcher_for, torch.device("cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        on_host = sampling_backend.columns_reader("auto", device, replica) is host_columns
    try:
        sampling_backend.columns_reader("cuda", device, replica)
        error = ""
    except ConfigError as refused:
        error = str(refused)
    return [on_host, len(caught), "no compiler" in error]


_SOUND = job._append_batch


def _disk_full(*_: Any) -> None:
    raise CacheError("the cache cannot be written", found="No space left on device")


def _bug(*_: Any) -> None:
    raise ValueError("a bug")


class _NotFinite(SlowTeacher):
    def chunks(self, tokens):
        for chunk in super().chunks(tokens):
            if self.columns.start:
                chunk.logits[0, 0] = float("nan")
            yield chunk


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    import numpy as np

    path = tmp_path_factory.mktemp("tokens") / "train"
    stream = np.random.default_rng(3).integers(0, VOCAB_SIZE, 16 * 40)
    with TokenIndexWriter(path, VOCAB_SIZE) as writer:
        for document in np.array_split(stream.astype(np.int64), 9):
            writer.add_document(document)
    return path


@pytest.fixture(scope="module")
def seen(prefix, tmp_path_factory) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("caches")
    return run_distributed(capture_in_all_ways, 4, prefix=str(prefix), folder=str(folder)), folder


def test_replicas_of_several_processes_write_the_bytes_of_one_process(seen, prefix, tmp_path):
    capture(prefix, tmp_path / "cache", SlowTeacher(0.0))
    assert digests(seen[1] / "pairs") == digests(tmp_path / "cache")
    assert [rank["led"] for rank in seen[0]] == [False, True, False, True]


def test_replicas_that_sample_by_kernels_write_the_same_bytes(seen):
    assert digests(seen[1] / "kernels") == digests(seen[1] / "pairs")


def test_a_rank_without_kernels_decides_for_its_replica(seen):
    assert [rank["reader"] for rank in seen[0]] == [
        *[[False, 0, False]] * 2,
        [True, 0, True],
        [True, 1, True],
    ]


def test_an_error_of_the_leader_is_an_error_of_every_rank_of_its_replica(seen):
    ranks, folder = seen
    assert all("No space left" in rank["disk"] for rank in ranks)
    assert [rank["bug"].split(":")[0] for rank in ranks] == ["TeacherError", "ValueError"] * 2
    assert all("a bug" in rank["bug"] for rank in ranks)
    for name in ("disk", "bug", "logits"):
        assert not (folder / name / "manifest.json").exists()


def test_logits_that_are_not_finite_stop_every_rank(seen):
    assert all(rank["logits"].startswith(TeacherError.__name__) for rank in seen[0])
    assert all("not finite" in rank["logits"] for rank in seen[0])
