"""Separate documents: what a teacher says of one does not depend on what stands before it in the sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill_pretrain.contracts import Replica
from distill_pretrain.corpus.sequence_plan import pieces_of
from distill_pretrain.corpus.token_writer import TokenIndexWriter
from distill_pretrain.corpus.tokens_record import TokensRecord
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import SequenceData, open_sequences
from distill_pretrain.errors import ConfigError
from distill_pretrain.processes.process import process_group
from distill_pretrain.teacher.capture import make_plans
from distill_pretrain.teacher.config import CaptureConfig, TeacherConfig
from distill_pretrain.teacher.engines import open_engine
from distill_pretrain.teacher.engines.apart import DocumentsApart
from distill_pretrain.teacher.scoring import score

transformers = pytest.importorskip("transformers")

VOCAB_SIZE, SEQ_LEN, END = 60, 24, 2
LENGTHS = [9, 15]
"""A and B, which fill a sequence."""


def of_family(family: str) -> Any:
    torch.manual_seed(0)
    common = {"vocab_size": VOCAB_SIZE, "initializer_range": 0.3}
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common)
        return transformers.GPT2LMHeadModel(config)
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, **common))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for family in ("gpt2", "llama"):
        found[family] = tmp_path_factory.mktemp(family)
        of_family(family).eval().save_pretrained(found[family])
    return found


def corpus_of(folder: Path, first: list[int], second: list[int]) -> Path:
    """Documents A and B, in this order under seed 0, and what says which token ends them."""
    with TokenIndexWriter(folder / "train", VOCAB_SIZE) as writer:
        for document in (first, second, [5, 6, END]):
            writer.add_document(document)
    TokensRecord(
        tokenizer={"kind": "hf", "sha256": "a", "vocab_size": VOCAB_SIZE, "file": "tokenizer"},
        vocab_size=VOCAB_SIZE,
        eod_id=END,
        corpora={},
        software={},
    ).save(folder)
    return folder / "train"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> list[Path]:
    """[A, B] and [A', B]."""
    draw = np.random.default_rng(3)
    a, other, b = (draw.integers(3, VOCAB_SIZE, n - 1).tolist() for n in (9, 9, 15))
    return [
        corpus_of(tmp_path_factory.mktemp("tokens"), [*first, END], [*b, END])
        for first in (a, other)
    ]


def data_of(prefix: Path, documents: str) -> SequenceData:
    # A seed that leaves the documents in their order.
    for seed in range(200):
        config = DataConfig(tokens=prefix, seq_len=SEQ_LEN, seed=seed, documents=documents)
        data = open_sequences(config)
        if data.plan._order.tolist() == [0, 1, 2]:
            return data
    raise AssertionError("no such seed")


def engine_of(kind: str, folder: Path, data: SequenceData) -> Any:
    engine = open_engine(kind, folder, "fp32", vocab_size=VOCAB_SIZE, seq_len=data.plan.seq_len)
    end = data.plan.document_end
    return engine if end is None else DocumentsApart(engine, end)


CASES = [("hf", "gpt2"), ("hf", "llama"), ("megatron", "llama")]


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_targets_of_a_document_do_not_depend_on_the_one_before_it(
    kind, family, folders, corpora, tmp_path
):
    from distill_pretrain.mcore.model.config import ParallelConfig
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    capture = CaptureConfig(output_dir=tmp_path / "cache", micro_batch_size=1, num_draws=40)
    found: dict[str, list[Any]] = {}
    with process_group(), model_parallel(ParallelConfig(), seed=0):
        for documents in ("separate", "joined"):
            for prefix in corpora:
                data = data_of(prefix, documents)
                engine = engine_of(kind, folders[family], data)
                (plan,) = make_plans(data, capture, engine.identity).values()
                batch = score(engine, data, 0, 1, [plan])
                assert batch is not None
                of_b = batch.targets(0, 0, LENGTHS[0], LENGTHS[1])
                # The position that ends a document has a target only where the next one belongs to the same text.
                expected = [True] * (LENGTHS[1] - 1) + [documents == "joined"]
                assert (of_b.entries_per_token > 0).tolist() == expected
                tokens, _ = data.plan.read([0])
                logits = engine.logits(torch.from_numpy(tokens.astype(np.int64)))[0, LENGTHS[0] :]
                found.setdefault(documents, []).append((of_b, logits))
    (targets, logits), (targets_too, logits_too) = found["separate"]
    assert torch.equal(logits, logits_too)
    assert np.array_equal(targets.ids, targets_too.ids)
    assert np.array_equal(targets.values, targets_too.values)
    (targets, logits), (targets_too, logits_too) = found["joined"]
    assert (logits - logits_too).abs().max() > 0.05
    assert targets.ids.tolist() != targets_too.ids.tolist()


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_logits_are_those_of_stock_transformers_over_the_documents_one_by_one(
    kind, family, folders, corpora
):
    from distill_pretrain.mcore.model.config import ParallelConfig
    from distill_pretrain.mcore.runtime.parallel import model_parallel

    tokens = np.random.default_rng(1).integers(2, 8, (3, SEQ_LEN))  # many documents
    ids = torch.from_numpy(tokens)
    with process_group(), model_parallel(ParallelConfig(), seed=0):
        engine = engine_of(kind, folders[family], data_of(corpora[0], "separate"))
        logits = engine.logits(ids)
        chunks = list(engine.chunks(ids))
    stock = of_family(family).eval()
    stock.load_state_dict(
        transformers.AutoModelForCausalLM.from_pretrained(folders[family]).state_dict()
    )
    tolerance = 1e-5 if kind == "hf" else 1e-4  # asked for: 1e-4
    pieces = pieces_of(tokens, END).tolist()
    assert len(pieces) > 10
    for row, start, stop in pieces:
        with torch.no_grad():
            expected = stock(ids[row : row + 1, start:stop]).logits[0]
        assert (logits[row, start:stop] - expected).abs().max() <= tolerance
    assert [chunk.first for chunk in chunks] == [row * SEQ_LEN + start for row, start, _ in pieces]
    whole = torch.cat([chunk.logits for chunk in chunks])
    assert (whole - logits.flatten(0, 1)).abs().max() <= 1e-5


def test_a_corpus_that_does_not_say_what_ends_its_documents_cannot_be_separate(tmp_path):
    with TokenIndexWriter(tmp_path / "train", VOCAB_SIZE) as writer:
        writer.add_document([3] * 40)
    config = {"tokens": tmp_path / "train", "seq_len": 8, "vocab_size": VOCAB_SIZE}
    with pytest.raises(
        ConfigError, match=r"unknown; where: data\.documents; .*tokens\.json beside"
    ):
        open_sequences(DataConfig(**config, documents="separate"))
    assert open_sequences(DataConfig(**config)).plan.document_end is None


def test_every_verb_opens_its_teacher_with_documents_apart(folders, corpora):
    from distill_pretrain.teacher.loading import load_replica, load_teacher

    teacher = TeacherConfig(kind="hf", path=folders["llama"])
    for documents in ("separate", "joined"):
        data = data_of(corpora[0], documents)
        for load in (load_teacher, load_replica):
            engine = load(teacher, data, corpora[0])
            assert isinstance(engine, DocumentsApart) == (documents == "separate")


def test_a_teacher_over_several_processes_is_refused():
    class Split:
        replica = Replica(group=object())  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="several processes hold together does not keep"):
        DocumentsApart(Split(), END)
