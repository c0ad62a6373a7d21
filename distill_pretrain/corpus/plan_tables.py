"""The tables of a sequence plan: in memory for small corpora, stored once and mapped by all ranks for large ones.

The format of a stored plan is in README.md.

Legend: D documents.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distill_pretrain.corpus.document_order import document_order, order_keys
from distill_pretrain.corpus.packing import Packing, best_fit
from distill_pretrain.errors import TokenDataError
from distill_pretrain.files.atomic import canonical_json, fsync_path
from distill_pretrain.files.folders import replace_folder

if TYPE_CHECKING:
    from distill_pretrain.corpus.token_index import TokenIndex

Int64s = npt.NDArray[np.int64]

TABLES_VERSION = 1
STORED_FROM = 1 << 20
"""Documents from which a plan is stored; the tables of fewer, and their lengths, are 24 MiB at most."""
MANIFEST = "plan.json"
_CHUNK = 1 << 21
_BUCKET = 1 << 20
_PROBES = 64
_log = logging.getLogger(__name__)


class PlanTables:
    """Where the documents of a plan stand.

    Attributes:
        order: int64[D], the documents in their order.
        ends: int64[D], the tokens up to the end of each, in that order.
        packed: the parts of documents in each sequence; None where the stream is cut.
        folder: where they are stored and mapped from; None where they are this process's own.
    """

    def __init__(
        self, order: Int64s, ends: Int64s, packed: Packing | None, folder: Path | None = None
    ) -> None:
        self.order = order
        self.ends = ends
        self.packed = packed
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., PlanTables], tuple[Any, ...]]:
        """Pickle the folder of stored ones: another process, such as a worker of a DataLoader, maps it itself."""
        if self.folder is not None:
            return _mapped_again, (self.folder,)
        return PlanTables, (self.order, self.ends, self.packed)


def plan_tables(index: TokenIndex, *, seq_len: int, seed: int, packing: str) -> PlanTables:
    """Build the tables of a plan, or map those that a process has stored.

    Those of `STORED_FROM` documents or more are stored beside the corpus, or, where that cannot be written to, in a
    folder of this user for temporary files. One process builds them while others wait, and all map them.

    Args:
        index: the corpus.
        seq_len: L.
        seed: of the order.
        packing: "cut" or "best_fit".
    """
    if index.num_documents < STORED_FROM:
        lengths = index.document_lengths
        order = document_order(index.num_documents, seed)
        packed = _packed(lengths, order, seq_len, seed) if packing == "best_fit" else None
        return PlanTables(order, np.cumsum(lengths[order]), packed)
    identity = _identity(index, seq_len, seed, packing)
    key = hashlib.sha256(canonical_json(identity)).hexdigest()[:16]
    for parent in (_beside, _temporary):
        # A folder without room, or that may not be written to, is a reason to try the next one.
        try:
            folder = parent(index.prefix) / key
            found = _load(folder, identity, index)
            return found or _build_once(folder, identity, index)
        except OSError as error:
            _log.info(f"the sequence plan of {index.prefix} is not stored there: {error}")
    _log.warning(
        f"the sequence plan of {index.prefix} is stored nowhere: every process holds one of its own"
    )
    order, ends = np.empty(index.num_documents, np.int64), np.empty(index.num_documents, np.int64)
    return PlanTables(order, ends, _fill(order, ends, identity, index))


def _packed(lengths: Int64s, order: Int64s, seq_len: int, seed: int) -> Packing:
    # Sequences in an order of their own.
    return best_fit(lengths, order, seq_len, lambda n: document_order(n, seed ^ (1 << 63)))


def write_order(
    order: Int64s, ends: Int64s, lengths_between: Callable[[int, int], Int64s], seed: int
) -> None:
    """Order documents as `document_order` does, with memory for some of them at a time.

    They are put into buckets by the first bits of their hashes, each of which is then sorted.

    Args:
        order: int64[D], filled with the documents.
        ends: int64[D], filled with the tokens up to the end of each, in that order.
        lengths_between: gives the tokens of the documents from one number up to another.
        seed: of the order.
    """
    num_documents = len(order)
    bits = min(12, max(1, (num_documents // _BUCKET).bit_length()))
    shift = np.uint64(64 - bits)

    def chunks() -> Iterator[tuple[Int64s, npt.NDArray[np.uint16]]]:
        for first in range(0, num_documents, _CHUNK):
            documents = np.arange(first, min(first + _CHUNK, num_documents))
            yield documents, (order_keys(documents, seed) >> shift).astype(np.uint16)

    sizes = np.zeros(1 << bits, np.int64)
    for _, buckets in chunks():
        sizes += np.bincount(buckets, minlength=1 << bits)
    heads = np.cumsum(sizes) - sizes
    for documents, buckets in chunks():
        by_bucket = np.argsort(buckets, kind="stable")
        sorted_documents = documents[by_bucket]
        lengths = lengths_between(int(documents[0]), int(documents[-1]) + 1)[by_bucket]
        stop = 0
        for bucket, count in enumerate(np.bincount(buckets, minlength=1 << bits).tolist()):
            start, stop = stop, stop + count
            head = int(heads[bucket])
            order[head : head + count] = sorted_documents[start:stop]
            ends[head : head + count] = lengths[start:stop]
            heads[bucket] += count
    total = 0
    for stop, size in zip(heads.tolist(), sizes.tolist(), strict=True):
        part = slice(stop - size, stop)
        by_key = np.argsort(order_keys(order[part], seed))
        order[part] = order[part][by_key]
        ends[part] = total + np.cumsum(ends[part][by_key])
        total = int(ends[stop - 1]) if size else total


def _identity(index: TokenIndex, seq_len: int, seed: int, packing: str) -> dict[str, Any]:
    """What stored tables are made from; the .idx by its length and time, as fingerprints are."""
    identity: dict[str, Any] = {
        "version": TABLES_VERSION,
        "idx": _stamp(index.prefix.with_name(f"{index.prefix.name}.idx")),
        "num_documents": index.num_documents,
        "num_tokens": index.num_tokens,
        "seed": seed,
        "packing": packing,
    }
    return identity | ({"seq_len": seq_len} if packing == "best_fit" else {})


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _beside(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.plans")


def _temporary(prefix: Path) -> Path:
    """A folder that no other user can write to; PermissionError where there is one of somebody else."""
    own = Path(tempfile.gettempdir()) / f"distill_pretrain-plans-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    status = own.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or own.is_symlink():
        raise PermissionError(f"{own} belongs to another user, or others may write to it")
    return own / hashlib.sha256(os.fsencode(prefix.resolve())).hexdigest()[:16]


def _build_once(folder: Path, identity: dict[str, Any], index: TokenIndex) -> PlanTables:
    """Store the tables, unless another process does so meanwhile; map them."""
    folder.parent.mkdir(exist_ok=True)
    with _alone(folder.with_name(f"{folder.name}.lock")) as is_alone:
        found = _load(folder, identity, index)
        if found is not None:
            return found
        if is_alone:
            _sweep(folder, identity)
        _log.info(f"ordering the {index.num_documents:,} documents of {index.prefix}, once")
        _store(folder, identity, index)
    found = _load(folder, identity, index)
    if found is None:
        raise OSError(f"{folder} was replaced by another plan, or its .idx changed meanwhile")
    return found


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Hold a lock during the block; False on a file system without locks, where two processes may build the same."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _sweep(folder: Path, identity: dict[str, Any]) -> None:
    """Remove what killed builders of this plan left, and the plans of an .idx that is no more.

    A process that has mapped one keeps it.
    """
    for path in folder.parent.glob(f"{folder.name}.*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.parent.glob(f"*/{MANIFEST}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(path.read_bytes())["identity"]["idx"] != identity["idx"]:
                shutil.rmtree(path.parent, ignore_errors=True)


def _store(folder: Path, identity: dict[str, Any], index: TokenIndex) -> None:
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        order, ends = (
            _new_table(temporary / f"{name}.npy", index.num_documents) for name in ("order", "ends")
        )
        packed = _fill(order, ends, identity, index)
        names = ["order", "ends"]
        for name, values in ({} if packed is None else packed._asdict()).items():
            _new_table(temporary / f"{name}.npy", len(values))[:] = values
            names.append(name)
        files = {}
        for name in names:
            fsync_path(temporary / f"{name}.npy")
            files[name] = _stamp(temporary / f"{name}.npy")
        (temporary / MANIFEST).write_bytes(canonical_json({"identity": identity, "files": files}))
        fsync_path(temporary / MANIFEST)
        replace_folder(
            folder, temporary, aside=temporary.with_name(temporary.name + ".replaced.tmp")
        )
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _fill(
    order: Int64s, ends: Int64s, identity: dict[str, Any], index: TokenIndex
) -> Packing | None:
    """Compute the tables of a large corpus."""
    write_order(order, ends, index.lengths_between, identity["seed"])
    if identity["packing"] != "best_fit":
        return None
    # Best fit needs all of the lengths at once, here in the one process that builds.
    lengths = index.lengths_between(0, index.num_documents)
    return _packed(lengths, order, identity["seq_len"], identity["seed"])


def _new_table(path: Path, length: int) -> np.memmap[Any, np.dtype[np.int64]]:
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=(length,))
    # A page that finds no room when it is written would end the process; this raises OSError.
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return table


def _load(folder: Path, identity: dict[str, Any], index: TokenIndex) -> PlanTables | None:
    """Map stored tables; None where there are none, or what is there is damaged or made from something else."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["identity"] != identity:
            return None
        found = _mapped(folder, manifest)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if _fits(found, identity, index) else None


def _mapped(folder: Path, manifest: dict[str, Any]) -> PlanTables:
    """Map the tables of a folder; ValueError where a file is not as it was stored."""
    names = ["order", "ends", *(Packing._fields if "starts" in manifest["files"] else ())]
    tables = {}
    for name in names:
        path = folder / f"{name}.npy"
        if _stamp(path) != manifest["files"][name]:
            raise ValueError(f"{path} was changed")
        # A plain array over the map: reading one place of a memmap is several times slower.
        tables[name] = np.asarray(np.load(path, mmap_mode="r"))
    order, ends = tables.pop("order"), tables.pop("ends")
    return PlanTables(order, ends, Packing(**tables) if tables else None, folder)


def _mapped_again(folder: Path) -> PlanTables:
    try:
        return _mapped(folder, json.loads((folder / MANIFEST).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TokenDataError(
            "the stored sequence plan is gone or was changed",
            where=folder,
            found=error,
            remedy="start the job again; it is built anew",
        ) from None


def _fits(tables: PlanTables, identity: dict[str, Any], index: TokenIndex) -> bool:
    """Whether some places, spread over the tables, are what this corpus and this seed give."""
    order, ends = tables.order, tables.ends
    count = index.num_documents
    if len(order) != count or len(ends) != count or int(ends[-1]) != index.num_tokens:
        return False
    if tables.packed is not None:
        *parts, starts = tables.packed
        if {len(part) for part in parts} != {int(starts[-1])}:
            return False
    places = np.unique(np.linspace(0, count - 1, _PROBES).astype(np.int64))
    documents = order[places]
    if documents.min() < 0 or documents.max() >= count:
        return False
    keys = order_keys(documents, identity["seed"])
    before = np.where(places > 0, ends[places - 1], 0)
    lengths = [int(index.lengths_between(d, d + 1)[0]) for d in documents.tolist()]
    return bool(np.all(keys[1:] > keys[:-1])) and (ends[places] - before).tolist() == lengths
