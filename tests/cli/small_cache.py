"""A corpus with its tokenizer record, and a finished cache of made-up targets that belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from distill_pretrain.cache.plan import CachePlan
from distill_pretrain.cache.writer import CacheWriter
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.corpus.sequence_plan import SequencePlan
from distill_pretrain.corpus.token_index import TokenIndex
from distill_pretrain.corpus.token_writer import TokenIndexWriter
from distill_pretrain.corpus.tokens_record import TokensRecord

VOCAB = 50
SEQ_LEN = 16
NUM_DRAWS = 6


@dataclass
class SmallCache:
    tokens: Path
    folder: Path
    recipe: Path


def make_small_cache(root: Path, *, shift: int = 0, seed: int = 0) -> SmallCache:
    """With a shift the blocks were made from the neighbouring tokens, though the plan is right."""
    tokens, folder = root / "tokens" / "train", root / "cache"
    rng = np.random.default_rng(seed)
    with TokenIndexWriter(tokens, VOCAB) as writer:
        for length in (20, 7, 33, 15):
            writer.add_document(rng.integers(3, VOCAB, length))
    index = TokenIndex.open(tokens)
    TokensRecord(
        tokenizer={
            "kind": "sentencepiece",
            "sha256": "d" * 64,
            "vocab_size": VOCAB,
            "file": "none",
        },
        vocab_size=VOCAB,
        eod_id=2,
        corpora={"train": index.fingerprint.as_dict()},
        software={},
    ).save(tokens.parent)
    sequences = SequencePlan(index, seq_len=SEQ_LEN, seed=7)
    _write_cache(folder, sequences, index, shift)
    recipe = root / "recipe.yaml"
    recipe.write_text(
        f"data: {{tokens: {tokens}, seq_len: {SEQ_LEN}, seed: 7, cache: {folder}}}\n",
        encoding="utf-8",
    )
    (folder / "recipe.yaml").write_bytes(recipe.read_bytes())
    return SmallCache(tokens, folder, recipe)


def upload(folder: Path, url: str) -> str:
    """Copy a cache to a URL of fsspec's in-memory store."""
    files = pytest.importorskip("fsspec").filesystem("memory")
    for path in folder.iterdir():
        files.pipe_file(f"{url.removeprefix('memory:/')}/{path.name}", path.read_bytes())
    return url


def published(folder: Path) -> dict[str, bytes]:
    """The files of a finished cache."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _write_cache(folder: Path, sequences: SequencePlan, index: TokenIndex, shift: int) -> None:
    fingerprint = index.fingerprint
    plan = CachePlan(
        sequence_plan_id=sequences.plan_id,
        tokens={"bin_sha256": fingerprint.bin_sha256, "idx_sha256": fingerprint.idx_sha256},
        tokenizer_sha256="d" * 64,
        vocab_size=VOCAB,
        seq_len=SEQ_LEN,
        num_sequences=sequences.num_sequences,
        sampler={
            "name": "systematic",
            "num_draws": NUM_DRAWS,
            "temperature": 1.0,
            "seed": 1,
            "rng": "none",
        },
        teacher={"kind": "made up"},
        micro_batch_size=1,
        block_tokens=8,
        shard_sequences=2,
        codec=1,
        software={},
    )
    writer = CacheWriter.create_or_resume(
        folder, plan, labels_of=lambda sequence: sequences.read([sequence])[1][0]
    )
    for shard in writer.pending():
        claimed = writer.claim(shard)
        assert claimed is not None
        with claimed:
            while claimed.next_block < claimed.num_blocks:
                sequence, offset, size = claimed.place(claimed.next_block)
                tokens, labels = (rows[0] for rows in sequences.read([sequence]))
                part = slice(offset, offset + size)
                claimed.append(_targets(labels[part]), np.roll(tokens, shift)[part])
            claimed.finish()
    writer.publish_manifest()


def _targets(labels: np.ndarray) -> RaggedTargets:
    """Two ids, 4 and 2 draws: every labelled position but those of odd labels holds its label."""
    ids, values, entries = [], [], []
    for label in labels.tolist():
        if label < 0:
            entries.append(0)
            continue
        first = label if label % 2 == 0 else label - 1
        ids += [0, first]
        values += [2, 4]
        entries.append(2)
    return RaggedTargets(
        kind="counts",
        num_draws=NUM_DRAWS,
        entries_per_token=np.array(entries, np.int32),
        ids=np.array(ids, np.int32),
        values=np.array(values, np.int32),
    )
