from __future__ import annotations

import errno
import json
import logging
import mmap
import multiprocessing
import os
import pickle
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from distill_pretrain.corpus import index_tables, plan_tables, sequence_plan
from distill_pretrain.corpus.document_order import document_order
from distill_pretrain.corpus.index_tables import IndexTables
from distill_pretrain.corpus.sequence_plan import SequencePlan
from distill_pretrain.corpus.token_index import TokenIndex
from distill_pretrain.errors import TokenDataError
from tests.support.cache_samples import write_corpus

PACKINGS = ("cut", "best_fit")


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    draw = np.random.default_rng(5)
    (tmp_path / "tokens").mkdir()
    documents = [draw.integers(1, 100, n).tolist() for n in draw.integers(1, 40, 100)]
    return write_corpus(tmp_path / "tokens/train", documents).prefix


@pytest.fixture
def stored(monkeypatch, tmp_path: Path) -> None:
    """Plans of any size are stored, and built in many parts; temporary files have a folder of their own."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(plan_tables, "STORED_FROM", 1)
    monkeypatch.setattr(plan_tables, "_CHUNK", 7)
    monkeypatch.setattr(plan_tables, "_BUCKET", 3)


def plan_of(prefix: Path, *, seed: int = 3, packing: str = "cut") -> SequencePlan:
    return SequencePlan(TokenIndex.open(prefix), seq_len=16, seed=seed, packing=packing)


def require_equal(plan: SequencePlan, expected: SequencePlan) -> None:
    numbers = np.arange(expected.num_sequences)
    assert plan.num_sequences == expected.num_sequences
    assert all(map(np.array_equal, plan.read(numbers), expected.read(numbers)))
    assert np.array_equal(plan._order, expected._order)
    assert np.array_equal(plan._ends, expected._ends)
    if expected._packed is not None:
        assert all(map(np.array_equal, plan._packed, expected._packed))
    assert plan.shares == expected.shares and plan.plan_id == expected.plan_id


def is_mapped(array: np.ndarray) -> bool:
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def builds(monkeypatch) -> list[int]:
    """The sizes of the plans that are built from now on."""
    counted, write = [], plan_tables.write_order

    def write_order(order: np.ndarray, *others: object) -> None:
        counted.append(len(order))
        write(order, *others)

    monkeypatch.setattr(plan_tables, "write_order", write_order)
    return counted


@pytest.fixture
def in_memory(prefix: Path) -> dict[str, SequencePlan]:
    plans = {packing: plan_of(prefix, packing=packing) for packing in PACKINGS}
    assert all(plan._tables.folder is None for plan in plans.values())
    return plans


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_stored_plan_has_the_bits_of_one_in_memory_and_is_built_once(
    in_memory, stored, prefix, packing, monkeypatch
):
    built = builds(monkeypatch)
    for _ in range(3):
        plan = plan_of(prefix, packing=packing)
        require_equal(plan, in_memory[packing])
        tables = plan._tables
        assert tables.folder.parent == prefix.with_name("train.plans")
        assert all(map(is_mapped, (tables.order, tables.ends, *(tables.packed or ()))))
    assert built == [100]
    other = plan_of(prefix, seed=4, packing=packing)
    assert built == [100, 100] and not np.array_equal(other._order, plan._order)


def test_documents_are_ordered_in_parts_as_they_are_at_once(stored):
    draw = np.random.default_rng(0)
    for num_documents in (*range(1, 40), 1000):
        seed = int(draw.integers(1 << 63)) * 2 + 1
        lengths = draw.integers(0, 4, num_documents)
        order, ends = np.full((2, num_documents), -1)
        plan_tables.write_order(order, ends, lambda a, b, lengths=lengths: lengths[a:b], seed)
        assert np.array_equal(order, document_order(num_documents, seed))
        assert np.array_equal(ends, np.cumsum(lengths[order]))


def test_several_processes_at_once_build_one_plan(in_memory, stored, prefix, tmp_path, monkeypatch):
    write, log = plan_tables.write_order, tmp_path / "builds"

    def slowly(*arguments: object) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        write(*arguments)

    monkeypatch.setattr(plan_tables, "write_order", slowly)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)

    def work() -> None:
        index = TokenIndex.open(prefix)
        barrier.wait(60)
        require_equal(SequencePlan(index, seq_len=16, seed=3), in_memory["cut"])

    processes = [context.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(log.read_text().splitlines()) == 1


def test_a_builder_that_was_killed_is_followed_by_another(in_memory, stored, prefix, monkeypatch):
    write = plan_tables.write_order
    monkeypatch.setattr(plan_tables, "write_order", lambda *_: os._exit(9))
    context = multiprocessing.get_context("fork")
    process = context.Process(target=plan_of, args=(prefix,))
    process.start()
    process.join(60)
    folder = prefix.with_name("train.plans")
    assert process.exitcode == 9 and list(folder.glob("*.tmp"))
    monkeypatch.setattr(plan_tables, "write_order", write)
    require_equal(plan_of(prefix), in_memory["cut"])
    assert not list(folder.glob("*.tmp"))


def swap_two_places(folder: Path) -> None:
    order = np.load(folder / "order.npy", mmap_mode="r+")
    # Where no sample of the tables looks.
    looked_at = np.linspace(0, len(order) - 1, plan_tables._PROBES).astype(int)
    a, b = np.setdiff1d(np.arange(len(order)), looked_at)[:2]
    order[[a, b]] = order[[b, a]]
    order.flush()


def claim_to_be(folder: Path, other: Path, *, honest: bool) -> None:
    """Put another plan in the place of one; a dishonest one says that it is what it replaces."""
    manifest = json.loads((folder / "plan.json").read_bytes())
    shutil.rmtree(folder)
    shutil.copytree(other, folder, copy_function=shutil.copy2)
    if not honest:
        found = json.loads((folder / "plan.json").read_bytes())
        found["identity"] = manifest["identity"]
        (folder / "plan.json").write_text(json.dumps(found))


DAMAGES = {
    "a place that was changed": lambda folder, _: swap_two_places(folder),
    "a table cut off": lambda folder, _: os.truncate(folder / "ends.npy", 500),
    "a table lost": lambda folder, _: os.remove(folder / "ends.npy"),
    "a manifest cut off": lambda folder, _: os.truncate(folder / "plan.json", 40),
    "a manifest of nothing": lambda folder, _: (folder / "plan.json").write_text("[]"),
    "another seed's": lambda folder, other: claim_to_be(folder, other, honest=True),
    "another seed's by the name of this one": lambda folder, other: claim_to_be(
        folder, other, honest=False
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_stored_plan_is_built_again(
    in_memory, stored, prefix, damage, monkeypatch
):
    other = plan_of(prefix, seed=8)._tables.folder
    folder = plan_of(prefix)._tables.folder
    DAMAGES[damage](folder, other)
    built = builds(monkeypatch)
    require_equal(plan_of(prefix), in_memory["cut"])
    assert built == [100]
    require_equal(plan_of(prefix), in_memory["cut"])
    assert built == [100]


@pytest.mark.parametrize("packing", PACKINGS)
def test_shares_do_not_depend_on_how_much_is_looked_at_at_once(in_memory, packing, monkeypatch):
    shares = in_memory[packing].shares
    for chunk in (1, 7, 99, 100):
        monkeypatch.setattr(sequence_plan, "_CHUNK", chunk)
        assert in_memory[packing].shares == shares


def test_a_stored_packing_of_other_sequences_is_built_again(in_memory, stored, prefix, monkeypatch):
    index = TokenIndex.open(prefix)
    other = SequencePlan(index, seq_len=17, seed=3, packing="best_fit")._tables.folder
    folder = plan_of(prefix, packing="best_fit")._tables.folder
    claim_to_be(folder, other, honest=True)
    built = builds(monkeypatch)
    require_equal(plan_of(prefix, packing="best_fit"), in_memory["best_fit"])
    assert built == [100]


def test_the_plans_of_an_index_that_is_no_more_are_removed(stored, prefix):
    first = plan_of(prefix)
    os.utime(f"{prefix}.idx", ns=(1, 1))
    second = plan_of(prefix)
    assert not first._tables.folder.exists() and second._tables.folder.exists()
    assert np.array_equal(first._order, second._order)


def test_beside_a_corpus_that_cannot_be_written_to_a_plan_is_a_temporary_file(
    in_memory, stored, prefix, tmp_path, monkeypatch, caplog
):
    prefix.with_name("train.plans").write_text("no folder")
    built = builds(monkeypatch)
    for _ in range(2):
        plan = plan_of(prefix)
        require_equal(plan, in_memory["cut"])
        assert plan._tables.folder.is_relative_to(tmp_path / "temporary")
    assert built == [100]
    # Not into a folder that another user could have made.
    (own,) = (tmp_path / "temporary").iterdir()
    own.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        plan = plan_of(prefix)
    assert plan._tables.folder is None and "stored nowhere" in caplog.text
    require_equal(plan, in_memory["cut"])


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_full_disk_leaves_a_plan_in_memory_and_nothing_half_made(
    in_memory, stored, prefix, tmp_path, packing, monkeypatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    plan = plan_of(prefix, packing=packing)
    assert plan._tables.folder is None
    require_equal(plan, in_memory[packing])
    left = [*prefix.parent.rglob("*.npy"), *(tmp_path / "temporary").rglob("*.npy")]
    assert left == []


def test_a_mapped_plan_is_pickled_by_its_folder(in_memory, stored, prefix):
    plan = plan_of(prefix, packing="best_fit")
    data = pickle.dumps(plan)
    assert len(data) < 1000
    again = pickle.loads(data)
    require_equal(again, in_memory["best_fit"])
    assert is_mapped(again._order)
    require_equal(pickle.loads(pickle.dumps(in_memory["cut"])), in_memory["cut"])
    shutil.rmtree(plan._tables.folder)
    with pytest.raises(TokenDataError, match=r"stored sequence plan is gone.*start the job again"):
        pickle.loads(data)


def test_an_index_is_mapped_and_its_tables_are_read_whole_once(prefix, monkeypatch):
    checked, check = [], IndexTables.check
    monkeypatch.setattr(IndexTables, "check", lambda t: (checked.append(1), check(t)))
    index = TokenIndex.open(prefix)
    tables = index._tables
    assert all(map(is_mapped, (tables.lengths, tables.pointers, tables.bounds)))
    assert len(checked) == 1
    assert index.fingerprint.num_documents == 100
    lengths = TokenIndex.open(prefix).document_lengths
    assert len(checked) == 1
    assert [index.document_length(d) for d in range(100)] == lengths.tolist()
    os.utime(f"{prefix}.idx", ns=(1, 1))
    TokenIndex.open(prefix)
    assert len(checked) == 2


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (34 + 4 * 57, np.int32(-1), "negative sequence length; .*found: -1"),
        (34 + 400 + 8 * 57, np.int64(4), "byte offset of sequence 57 contradicts"),
        (34 + 400 + 800 + 8 * 56, np.int64(58), "boundaries are wrong; .*a decreasing pair"),
        (34 + 400 + 800 + 8 * 57, np.int64(55), "boundaries are wrong; .*a decreasing pair"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 19, 57, 1000])
def test_a_fault_in_any_part_of_the_tables_is_found(prefix, at, value, message, chunk, monkeypatch):
    monkeypatch.setattr(index_tables, "_CHUNK", chunk)
    TokenIndex.open(prefix)
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(at)
        file.write(value.tobytes())
    with pytest.raises(TokenDataError, match=message):
        TokenIndex.open(prefix)
