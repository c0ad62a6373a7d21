"""One teacher gives the same targets whichever engine holds it, in however many processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from distill_pretrain.cache import CachePlan
from distill_pretrain.contracts import RaggedTargets
from distill_pretrain.data.config import DataConfig
from distill_pretrain.data.sources import SequenceData, open_sequences
from distill_pretrain.errors import ConfigError, LayoutError, MissingDependency, TeacherError
from distill_pretrain.processes.process import process_group
from distill_pretrain.teacher.capture import make_plans
from distill_pretrain.teacher.config import CaptureConfig, TeacherConfig
from distill_pretrain.teacher.engines import open_engine, open_teacher_engine, teacher_groups
from distill_pretrain.teacher.engines.split_hf import open_transformers_trunk
from distill_pretrain.teacher.scoring import SampledBatch, score
from tests.support.distributed import run_distributed
from tests.support.small_corpus import SEQ_LEN, VOCAB_SIZE, write_small_corpus

transformers = pytest.importorskip("transformers")

COUNT = 3  # sequences of a micro-batch: neither two nor four processes share them out evenly
CHUNK = 40  # positions of a chunk: neither a divisor of a sequence nor a multiple
SETS: dict[str, dict[str, Any]] = {
    "systematic": {"num_draws": 20},
    "multinomial": {"sampler": "multinomial", "num_draws": 9},
    "top": {"sampler": "topk", "num_draws": 7},
    "nucleus": {"sampler": "topp", "num_draws": 30, "top_p": 0.8},
}
distribution = pytest.importorskip("transformers.distributed")
SPLITS = hasattr(distribution.DistributedConfig, "dp_replicate_size")  # from 5.20 on
LAYOUTS: dict[str, dict[str, Any]] = {
    "hf, four copies": {"kind": "hf"},
    "hf, two copies in two": {"kind": "hf", "tensor": 2},
    "hf, fsdp in four": {"kind": "hf", "fsdp": 4},
    "hf, two copies of fsdp": {"kind": "hf", "fsdp": 2},
    "megatron, two copies in two": {"kind": "megatron", "tensor": 2},
    "megatron, two pipelines": {"kind": "megatron", "pipeline": 2},
    "megatron, tensor and pipeline": {"kind": "megatron", "tensor": 2, "pipeline": 2},
    "deepspeed": {"kind": "deepspeed", "zero": 4},
    "deepspeed, offloaded": {"kind": "deepspeed", "zero": 4, "offload": True},
}
if not SPLITS:
    LAYOUTS = {k: v for k, v in LAYOUTS.items() if v["kind"] != "hf" or len(v) == 1}


def data_of(tokens: str) -> SequenceData:
    return open_sequences(DataConfig(tokens=Path(tokens), vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN))


def plans_of(sequences: SequenceData) -> list[CachePlan]:
    config = CaptureConfig(output_dir=Path("unused"), sets=SETS)  # type: ignore[arg-type]
    return list(make_plans(sequences, config, {"kind": "hf"}).values())


def teacher_of(model: str | Path, **settings: Any) -> TeacherConfig:
    return TeacherConfig(path=Path(model), head_chunk_tokens=CHUNK, **settings)


def listed(batch: SampledBatch) -> list[Any]:
    sets = [[t.entries_per_token.tolist(), t.ids.tolist(), t.values.tolist()] for t in batch.sets]
    return [sets, batch.entropy, batch.uniform_share, batch.top_share]


def engines_job(*, tokens: str, model: str) -> dict[str, Any]:
    """Name of a layout -> what the first copy's leader and the last one's give, and what a NaN does to each rank."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    sequences = data_of(tokens)
    plans = plans_of(sequences)
    with process_group():
        for name, settings in LAYOUTS.items():
            teacher = teacher_of(model, **settings)
            with teacher_groups(teacher):
                engine = open_teacher_engine(teacher, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN)
                batch = None
                # Copies work at their own pace.
                for _ in range(1 + engine.replica.number):
                    batch = score(engine, sequences, 2, COUNT, plans)
                assert (batch is not None) == engine.replica.is_leader
                mine = {
                    "number": engine.replica.number,
                    "batch": None if batch is None else listed(batch),
                    "fault": _fault(engine, sequences, plans),
                }
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
            found[name] = everyone
    return found


def _fault(engine: Any, sequences: SequenceData, plans: list[CachePlan]) -> str:
    """What a NaN in the columns of the last rank of the vocabulary says here."""
    head, group = engine._head, engine.replica.vocab_group
    if head is not None and (
        group is None or dist.get_rank(group) == dist.get_world_size(group) - 1
    ):
        head._weight = head._weight.clone()
        head._weight[-1] = torch.nan
    try:
        score(engine, sequences, 2, COUNT, plans)
    except TeacherError as error:
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return write_small_corpus(tmp_path_factory.mktemp("tokens") / "train")


def save_model(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB_SIZE + 24,  # padded, as checkpoints often are
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    config = transformers.LlamaConfig(**{**settings, **changes})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def found(tokens, model) -> dict[str, Any]:
    pytest.importorskip("deepspeed")
    pytest.importorskip("accelerate")
    return run_distributed(engines_job, 4, tokens=str(tokens), model=str(model))


@pytest.fixture(scope="module")
def sequences(tokens) -> SequenceData:
    return data_of(str(tokens))


@pytest.fixture(scope="module")
def alone(sequences, model) -> SampledBatch:
    """What one process with the whole model gives."""
    engine = open_teacher_engine(
        teacher_of(model, kind="hf"), vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN
    )
    batch = score(engine, sequences, 2, COUNT, plans_of(sequences))
    assert batch is not None
    return batch


def rows_of(entries: list[int], ids: list[int], values: list[float]) -> list[Any]:
    ends = np.cumsum(entries)[:-1]
    return [
        (tuple(i), tuple(v))
        for i, v in zip(
            np.split(np.array(ids), ends), np.split(np.array(values), ends), strict=True
        )
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_targets_of_one_process(found, alone, layout):
    expected = listed(alone)
    leaders = [of_rank for of_rank in found[layout] if of_rank["batch"] is not None]
    copies = 4 // teacher_of("any", **LAYOUTS[layout]).processes
    assert [leader["number"] for leader in leaders] == list(range(copies))
    for leader in leaders:
        assert leader["batch"] == leaders[0]["batch"]
        sets, *figures = leader["batch"]
        assert figures == pytest.approx(expected[1:], rel=1e-4)
        if layout == "hf, four copies":
            assert sets == expected[0]
        for of_plan, alone_of_plan, settings in zip(sets, expected[0], SETS.values(), strict=True):
            pairs = list(zip(rows_of(*of_plan), rows_of(*alone_of_plan), strict=True))
            # Other shapes of matrix products round in other ways; a draw next to a boundary may then fall elsewhere.
            moved = [a[0] != b[0] for a, b in pairs]
            assert np.mean(moved) <= 0.03, f"{sum(moved)} of {len(moved)} positions moved"
            if "top" in settings.get("sampler", ""):
                same = [(a[1], b[1]) for a, b in pairs if a[0] == b[0]]
                assert max(np.abs(np.subtract(a, b)).max(initial=0) for a, b in same) < 2e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_nan_in_one_part_of_the_vocabulary_is_an_error_on_every_rank(found, layout):
    faults = {of_rank["fault"] for of_rank in found[layout]}
    assert len(faults) == 1
    assert "not finite; where: sequences 2, 3, 4" in faults.pop()


class LargestLogits(TorchDispatchMode):
    """Notes the most elements of any tensor over the vocabulary made inside it."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and VOCAB_SIZE in tensor.shape:
                self.most = max(self.most, tensor.numel())
        return result


def test_the_logits_of_a_micro_batch_are_never_whole(sequences, model):
    engine = open_teacher_engine(
        teacher_of(model, kind="hf"), vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN
    )
    with LargestLogits() as seen:
        score(engine, sequences, 0, 8, plans_of(sequences))
    assert CHUNK * VOCAB_SIZE <= seen.most < 8 * SEQ_LEN * VOCAB_SIZE / 2


def test_chunks_are_the_rows_of_the_models_own_logits(sequences, model, tmp_path):
    ids, _ = sequences.plan.read(np.arange(3))
    tied = save_model(tmp_path / "tied", tie_word_embeddings=True)
    for folder in (model, tied):
        teacher = teacher_of(folder, kind="hf")
        engine: Any = open_teacher_engine(teacher, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN)
        given = torch.from_numpy(ids.astype(np.int64))
        chunks = list(engine.chunks(given))
        assert [chunk.first for chunk in chunks] == [0, 40, 80]
        found = torch.cat([chunk.logits for chunk in chunks])
        assert torch.allclose(found, engine.logits(given).flatten(0, 1), atol=1e-5)


def test_a_model_that_soft_caps_its_logits_is_followed(sequences, tmp_path):
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
        initializer_range=0.3,
    )
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    engine: Any = open_teacher_engine(
        teacher_of(tmp_path, kind="hf"), vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN
    )
    ids, _ = sequences.plan.read(np.arange(2))
    given = torch.from_numpy(ids.astype(np.int64))
    found = torch.cat([chunk.logits for chunk in engine.chunks(given)])
    assert torch.allclose(found, engine.logits(given).flatten(0, 1), atol=1e-5)
    assert found.abs().max() <= 2


def test_rows_of_a_batch_are_cut_where_its_positions_are(alone):
    for index in range(len(SETS)):
        whole = alone.sets[index]
        parts = [
            alone.targets(index, sequence, offset, 8)
            for sequence in range(2, alone.stop)
            for offset in range(0, SEQ_LEN, 8)
        ]
        assert np.array_equal(np.concatenate([p.ids for p in parts]), whole.ids)
        assert np.array_equal(np.concatenate([p.values for p in parts]), whole.values)
        lengths = np.concatenate([p.entries_per_token for p in parts])
        assert np.array_equal(lengths, whole.entries_per_token)
        assert all(isinstance(p, RaggedTargets) and len(p.entries_per_token) == 8 for p in parts)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "hf", "pipeline": 2}, "a pipeline takes kind=megatron"),
        ({"kind": "hf", "tensor": 2, "fsdp": 2}, "one of these ways"),
        ({"kind": "hf", "offload": True}, "offloading takes kind=deepspeed"),
        ({"kind": "megatron", "fsdp": 2}, "split by tensor and pipeline"),
        ({"kind": "deepspeed", "tensor": 2}, "ZeRO-3 splits the weights alone"),
    ],
)
def test_what_an_engine_does_not_have_is_refused_with_the_reason(settings, expected):
    with pytest.raises(ValidationError, match=expected):
        teacher_of("any", **settings)


def test_processes_that_cannot_be_shared_out_are_refused(model):
    with (
        pytest.raises(LayoutError, match=r"1 processes, 2 to a copy"),
        teacher_groups(teacher_of(model, kind="hf", tensor=2)),
    ):
        pass
    with pytest.raises(ConfigError, match=r"set teacher\.kind=hf"):
        open_engine("deepspeed", model, "fp32", vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN)


def test_a_transformers_that_cannot_split_is_named(model, monkeypatch):
    class OlderConfig:
        def __init__(self, enable_expert_parallel: bool = False) -> None: ...

    pytest.importorskip("accelerate")
    monkeypatch.setattr(distribution, "DistributedConfig", OlderConfig)
    teacher = teacher_of(model, kind="hf", tensor=2)
    config = transformers.AutoConfig.from_pretrained(model)
    with pytest.raises(MissingDependency, match=r"transformers>=5\.20.*teacher\.tensor"):
        open_transformers_trunk(teacher, config, "lm_head")


def test_the_layout_is_part_of_the_identity(model):
    def identity(**settings: Any) -> dict[str, Any]:
        teacher = teacher_of(model, kind="hf")
        teacher = teacher.model_copy(update=settings)
        engine = open_teacher_engine(teacher, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN)
        return engine.identity

    assert identity() != identity(head_chunk_tokens=41)
