"""Opening a cache asks storage as little for many shards as for few, on one rank of a job; the others ask nothing."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from distill_pretrain.cache import CacheReader
from distill_pretrain.cache.writer import CacheWriter
from distill_pretrain.corpus.sequence_plan import SequencePlan
from distill_pretrain.corpus.token_index import TokenIndex
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import open_sources
from distill_pretrain.errors import CacheIncomplete
from distill_pretrain.processes.process import process_group
from tests.support.cache_samples import make_plan, make_targets, write_corpus
from tests.support.distributed import run_distributed

SEQ_LEN, VOCAB = 12, 300
CALLS = ("ls", "info", "cat_file", "find", "exists", "isfile", "isdir", "glob", "walk")


def write_corpus_and_cache(root: Path, num_sequences: int) -> DataConfig:
    """As many shards as sequences."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, VOCAB, SEQ_LEN).tolist() for _ in range(num_sequences)]
    index = write_corpus(root / "tokens", documents, VOCAB)
    sequences = SequencePlan(index, seq_len=SEQ_LEN, seed=7)
    plan = make_plan(
        sequence_plan_id=sequences.plan_id,
        tokens={key: index.fingerprint.as_dict()[key] for key in ("bin_sha256", "idx_sha256")},
        vocab_size=VOCAB,
        seq_len=SEQ_LEN,
        num_sequences=num_sequences,
        shard_sequences=1,
    )
    writer = CacheWriter.create_or_resume(root / "cache", plan)
    for shard in range(plan.num_shards):
        claimed = writer.claim(shard)
        assert claimed is not None
        with claimed:
            while claimed.next_block < claimed.num_blocks:
                sequence, offset, size = claimed.place(claimed.next_block)
                tokens = sequences.read([sequence])[0][0, offset : offset + size]
                claimed.append(make_targets(plan, sequence, offset, size), tokens)
            claimed.finish()
    writer.publish_manifest()
    return DataConfig(
        tokens=root / "tokens",
        vocab_size=VOCAB,
        seq_len=SEQ_LEN,
        seed=7,
        cache=f"file://{root / 'cache'}",
    )


def counted_calls() -> Counter[str]:
    """From now on, what is asked of fsspec's local file system, by name."""
    from fsspec.implementations.local import LocalFileSystem

    counts: Counter[str] = Counter()

    def counting(name: str, real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return real(*args, **options)

        return call

    for name in CALLS:
        setattr(LocalFileSystem, name, counting(name, getattr(LocalFileSystem, name)))
    return counts


def open_and_read(recipes: list[str]) -> list[list[dict[str, Any]]]:
    """What every rank asked storage for, by recipe: to open the cache, and, on the last rank, to read a sequence."""
    seen = []
    counts = counted_calls()
    with process_group():
        last = dist.get_world_size() - 1
        for recipe in recipes:
            counts.clear()
            with open_sources(DataConfig.model_validate_json(recipe), kd_weight=1.0) as (source,):
                opening = dict(counts)
                assert source.identity["cache_plan_id"] == source.cache.plan.plan_id
                if dist.get_rank() == last:
                    tokens = source.sequences.plan.read([3])[0][0]
                    assert len(source.cache.read(3, tokens).entries_per_token) == SEQ_LEN
                reading = dict(counts - Counter(opening))
                digest = source.cache.manifest_sha256
            every: list[Any] = [None] * (last + 1)
            dist.all_gather_object(
                every, {"opening": opening, "reading": reading, "digest": digest}
            )
            seen.append(every)
    return seen


def test_the_first_rank_asks_as_little_of_many_shards_as_of_few_and_the_others_nothing(
    tmp_path: Path,
) -> None:
    recipes = []
    for num_sequences in (4, 40):
        (tmp_path / str(num_sequences)).mkdir()
        data = write_corpus_and_cache(tmp_path / str(num_sequences), num_sequences)
        recipes.append(data.model_dump_json())
    few, many = run_distributed(open_and_read, 2, recipes=recipes)
    # plan.json, extent.json, manifest.json; one listing, which asks what the folder is.
    assert few[0]["opening"] == many[0]["opening"] == {"ls": 1, "info": 1, "cat_file": 3}
    for first, last in (few, many):
        assert last["opening"] == {} and first["reading"] == {}
        assert last["reading"]["info"] == 1 and "ls" not in last["reading"]
        assert last["digest"] == first["digest"]
    written = (tmp_path / "40" / "cache" / "manifest.json").read_bytes()
    assert many[1]["digest"] == hashlib.sha256(written).hexdigest()


def test_what_the_first_rank_finds_missing_every_rank_is_told(tmp_path: Path) -> None:
    data = write_corpus_and_cache(tmp_path, 4)
    (tmp_path / "cache" / "s-000002.dpt").unlink()
    told = run_distributed(open_in_vain, 2, recipe=data.model_dump_json())
    assert told[0] == told[1] and "no s-000002.dpt: sequences 2 to 2" in told[0]


def open_in_vain(recipe: str) -> list[str]:
    with process_group():
        with (
            pytest.raises(CacheIncomplete) as caught,
            open_sources(DataConfig.model_validate_json(recipe), kd_weight=1.0),
        ):
            pass
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, str(caught.value))
        return every


def test_a_reader_from_another_process_names_a_shard_that_its_node_does_not_see(
    tmp_path: Path,
) -> None:
    data = write_corpus_and_cache(tmp_path, 4)
    sequences = SequencePlan(TokenIndex.open(data.tokens), seq_len=SEQ_LEN, seed=data.seed)
    with CacheReader.open(tmp_path / "cache") as first:
        head = first.head
    (tmp_path / "cache" / "s-000003.dpt").unlink()
    with (
        CacheReader.of(head) as reader,
        pytest.raises(CacheIncomplete, match=r"node does not see it; where: .*s-000003\.dpt, seq"),
    ):
        reader.read(3, sequences.read([3])[0][0])
