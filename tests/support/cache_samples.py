"""Small corpora and caches whose contents are a pure function of the position."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distill_pretrain.cache import CachePlan, CacheWriter
from distill_pretrain.cache.codec.hc.build import build_tables
from distill_pretrain.cache.codec.hc.tables import HcTables
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.corpus.token_index import TokenIndex
from distill_pretrain.corpus.token_writer import TokenIndexWriter


def write_corpus(prefix: Path, documents: list[list[int]], vocab_size: int = 100) -> TokenIndex:
    with TokenIndexWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(np.array(document))
    return TokenIndex.open(prefix)


def make_plan(**changes: object) -> CachePlan:
    fields: dict[str, object] = {
        "sequence_plan_id": "a" * 64,
        "tokens": {"bin_sha256": "b" * 64, "idx_sha256": "c" * 64},
        "tokenizer_sha256": "d" * 64,
        "vocab_size": 300,
        "seq_len": 12,
        "num_sequences": 5,
        "sampler": {
            "name": "systematic",
            "num_draws": 7,
            "temperature": 1.0,
            "seed": 1,
            "rng": "philox4x32-10",
        },
        "teacher": {"kind": "test", "weights": "e" * 64},
        "micro_batch_size": 2,
        "block_tokens": 5,
        "shard_sequences": 2,
        "codec": 1,
        "software": {"distill-pretrain": "0"},
    }
    return CachePlan(**{**fields, **changes})  # type: ignore[arg-type]


def make_tokens(plan: CachePlan, sequence: int) -> npt.NDArray[np.int32]:
    steps = np.arange(plan.seq_len, dtype=np.int64) + sequence * plan.seq_len
    return ((steps * 2654435761 >> 7) % plan.vocab_size).astype(np.int32)


def make_labels(plan: CachePlan, sequence: int) -> npt.NDArray[np.int32]:
    labels = np.roll(make_tokens(plan, sequence), -1)
    labels[-1] = -100
    return labels


def make_targets(plan: CachePlan, sequence: int, offset: int, size: int) -> RaggedTargets:
    """A pure function of the position, written out so that golden bytes never move."""
    lengths, ids, values, logprobs = [], [], [], []
    for place in range(sequence * plan.seq_len + offset, sequence * plan.seq_len + offset + size):
        entries = 0 if place % 11 == 3 else 1 + place % 3
        row = [
            (place * 37 + 11 * k) % (plan.vocab_size // 3) + k * (plan.vocab_size // 3)
            for k in range(entries)
        ]
        lengths.append(entries)
        ids += row
        logprobs += [-(2.0 + (place + k) % 20) for k in range(entries)]
        values += [1] * (entries - 1) + [plan.num_draws - entries + 1] if entries else []
    if plan.kind == "logprobs":
        stored = np.array(logprobs, np.float32)
    else:
        stored = np.array(values, np.int32)
    return RaggedTargets(
        kind=plan.kind,
        num_draws=plan.num_draws,
        entries_per_token=np.array(lengths, np.int32),
        ids=np.array(ids, np.int32),
        values=stored,
    )


def write_shard(writer: CacheWriter, shard: int) -> bool:
    claimed = writer.claim(shard)
    if claimed is None:
        return False
    with claimed:
        while claimed.next_block < claimed.num_blocks:
            sequence, offset, size = claimed.place(claimed.next_block)
            tokens = make_tokens(writer.plan, sequence)[offset : offset + size]
            claimed.append(make_targets(writer.plan, sequence, offset, size), tokens)
        claimed.finish()
    return True


def make_tables(plan: CachePlan) -> HcTables:
    """Tables of the plan's first sequence."""
    pilot = [make_targets(plan, 0, 0, plan.seq_len)]
    return build_tables(pilot, kind=plan.kind, num_draws=plan.num_draws, vocab_size=plan.vocab_size)


def open_writer(folder: Path, plan: CachePlan) -> CacheWriter:
    return CacheWriter.create_or_resume(
        folder,
        plan,
        make_tables=lambda: make_tables(plan),
        labels_of=lambda sequence: make_labels(plan, sequence),
        sync_every=4,
    )


def write_cache(folder: Path, plan: CachePlan) -> Path:
    writer = open_writer(folder, plan)
    for shard in range(plan.num_shards):
        write_shard(writer, shard)
    writer.publish_manifest()
    return folder


def by_id(targets: RaggedTargets) -> list[list[tuple[int, float]]]:
    """(id, value) pairs of every position, in the order of ids: codecs differ in their order."""
    ends = np.cumsum(targets.entries_per_token)[:-1]
    rows = zip(np.split(targets.ids, ends), np.split(targets.values, ends), strict=True)
    return [sorted(zip(i.tolist(), v.tolist(), strict=True)) for i, v in rows]


def tree(folder: Path) -> dict[str, bytes]:
    """Published files; leftovers of killed writers (.part of nobody, temporary names) excluded."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and path.suffix not in (".part", ".bad")
    }


@dataclass
class Cache:
    folder: Path
    plan: CachePlan
