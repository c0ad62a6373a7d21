"""The corpora of a blend must fit together, and each its cache; other verbs say what to run instead."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from distill_pretrain.corpus.token_index import TokenIndex
from distill_pretrain.corpus.token_writer import TokenIndexWriter
from distill_pretrain.corpus.tokens_record import TokensRecord
from distill_pretrain.data.config import BlendSource, DataConfig
from distill_pretrain.data.sources import (
    open_blend,
    open_sequences,
    open_sources,
    require_caches,
    require_one_source,
)
from distill_pretrain.errors import ConfigError, TokenDataError, TokenizerMismatch
from distill_pretrain.jobs.capture import capture_caches
from distill_pretrain.jobs.recipe import Recipe
from distill_pretrain.jobs.verify import verify

SEQ_LEN = 16


def corpus(folder, *, vocab=50, digest="d" * 64, seed=0):
    prefix = folder / "train"
    rng = np.random.default_rng(seed)
    with TokenIndexWriter(prefix, vocab) as writer:
        for length in (40, 33, 25):
            writer.add_document(rng.integers(3, vocab, length))
    TokensRecord(
        tokenizer={"kind": "sentencepiece", "sha256": digest, "vocab_size": vocab, "file": "none"},
        vocab_size=vocab,
        eod_id=2,
        corpora={"train": TokenIndex.open(prefix).fingerprint.as_dict()},
        software={},
    ).save(folder)
    return prefix


@pytest.fixture
def first(tmp_path):
    return corpus(tmp_path / "a")


def blend_of(first, other, **settings):
    return DataConfig(
        tokens=first,
        seq_len=SEQ_LEN,
        seed=7,
        weight=0.7,
        blend=(BlendSource(tokens=other, weight=0.3, **settings),),
    )


def test_a_source_takes_what_it_does_not_say_from_the_section(first, tmp_path):
    other = corpus(tmp_path / "b", seed=1)
    alone, source = blend_of(first, other).sources
    assert (alone.tokens, alone.seed, alone.weight, alone.blend) == (first, 7, 0.7, ())
    assert (source.tokens, source.seed, source.weight, source.blend) == (other, 7, 0.3, ())
    source = blend_of(first, other, seed=0, num_sequences=3).sources[1]
    assert (source.seed, source.num_sequences, source.seq_len) == (0, 3, SEQ_LEN)


def test_corpora_that_fit_are_opened_in_order(first, tmp_path):
    data = blend_of(first, corpus(tmp_path / "b", seed=1), num_sequences=3)
    opened = open_blend(data)
    assert [source.num_sequences for source in opened] == [opened[0].plan.num_sequences, 3]
    assert opened[0].plan.plan_id != opened[1].plan.plan_id
    with open_sources(data, kd_weight=0.0) as sources:
        assert [source.for_batches.weight for source in sources] == [0.7, 0.3]
        assert sources[0].identity != sources[1].identity


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"vocab": 60}, "differ in vocabulary"), ({"digest": "e" * 64}, "different tokenizers")],
)
def test_corpora_of_different_tokenizers_are_refused(first, tmp_path, changes, expected):
    other = corpus(tmp_path / "b", **changes)
    with pytest.raises(TokenizerMismatch, match=expected) as caught:
        open_blend(blend_of(first, other))
    assert str(other) in str(caught.value)


def test_corpora_whose_tokenizers_give_the_same_ids_fit(first, tmp_path):
    others = [corpus(tmp_path / name, seed=seed) for name, seed in (("b", 1), ("c", 2))]
    for other, files in zip(others, "ef", strict=True):
        record = TokensRecord.load(other.parent)
        made_by = {**record.tokenizer, "sha256": files * 64, "semantic_sha256": "5" * 64}
        replace(record, tokenizer=made_by).save(other.parent)
    opened = open_blend(blend_of(*others))
    assert [source.tokenizer_sha256 for source in opened] == ["5" * 64] * 2
    with pytest.raises(TokenizerMismatch, match="different tokenizers"):
        open_blend(blend_of(first, others[0]))


def test_fewer_ids_than_the_tokenizer_has_do_where_the_corpus_holds_no_other(first):
    record = TokensRecord.load(first.parent)
    replace(record, vocab_size=53).save(first.parent)
    data = DataConfig(tokens=first, seq_len=SEQ_LEN)
    largest = open_sequences(data).index.fingerprint.max_token_id
    assert largest < 50
    enough = data.model_copy(update={"vocab_size": largest + 1})
    assert open_sequences(enough).vocab_size == largest + 1
    for vocab_size, message in ((largest, "outside the vocabulary"), (54, "more than the token")):
        with pytest.raises(TokenizerMismatch, match=message):
            open_sequences(data.model_copy(update={"vocab_size": vocab_size}))


def test_too_many_sequences_of_a_source_are_refused_by_its_name(first, tmp_path):
    other = corpus(tmp_path / "b", seed=1)
    with pytest.raises(TokenDataError, match="num_sequences") as caught:
        open_blend(blend_of(first, other, num_sequences=1000))
    assert str(other) in str(caught.value)


def test_distillation_needs_a_cache_for_every_source(first, tmp_path):
    other = tmp_path / "b" / "train"
    data = blend_of(first, other).model_copy(update={"cache": "cache_a"})
    with pytest.raises(ConfigError, match=r"data\.blend") as caught:
        require_caches(data, 0.5)
    assert str(other) in str(caught.value) and f"{first}," not in str(caught.value)
    require_caches(data, 0.0)
    require_caches(blend_of(first, other, cache="b").model_copy(update={"cache": "a"}), 0.5)


def test_a_verb_for_one_corpus_lists_the_runs_of_a_blend(first, tmp_path):
    data = blend_of(first, tmp_path / "b" / "train", seed=3, cache="cache_b")
    with pytest.raises(ConfigError) as caught:
        require_one_source(data, "verify", "data.cache")
    runs = [line for line in str(caught.value).splitlines() if "distill-pretrain verify" in line]
    assert len(runs) == 2
    assert f"data.tokens={first} data.seed=7" in runs[0]
    assert "data.seed=3" in runs[1] and "data.cache=cache_b" in runs[1]
    require_one_source(data.sources[0], "verify", "data.cache")


@pytest.mark.parametrize("job", [capture_caches, verify])
def test_capture_and_verify_refuse_a_blend(first, tmp_path, job):
    data = blend_of(first, tmp_path / "b" / "train").model_copy(update={"cache": "cache"})
    recipe = Recipe.model_validate(
        {
            "data": data.model_dump(),
            "teacher": {"path": "teacher"},
            "capture": {"output_dir": tmp_path / "out"},
        }
    )
    with pytest.raises(ConfigError, match="works on one corpus"):
        job(recipe)
