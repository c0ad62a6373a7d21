"""A mixture of teachers: targets of the weighted mean of their distributions, drawn without bias, resumable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test_capture import BatchSensitive, capture, sequences  # noqa: F401 - a fixture

from distill_pretrain.contracts import LogitsChunk, Replica
from distill_pretrain.errors import CacheError, ConfigError, TokenizerMismatch
from distill_pretrain.sampling.host import host_columns
from distill_pretrain.sampling.samplers import Sampler, sample_columns
from distill_pretrain.teacher import loading
from distill_pretrain.teacher.capture import software_versions
from distill_pretrain.teacher.config import TeacherConfig
from distill_pretrain.teacher.engines.mixture import MixtureEngine

V = 13


class Fixed:
    """The same logits at every position."""

    vocab_size, device, replica = V, torch.device("cpu"), Replica()

    def __init__(self, name: str, logits: torch.Tensor) -> None:
        self.identity: dict[str, Any] = {"kind": "hf", "name": name}
        self.row = logits

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.row.expand(*tokens.shape, V)

    def chunks(self, tokens: torch.Tensor) -> Iterator[LogitsChunk]:
        rows = self.logits(tokens).flatten(0, 1)
        for first in range(0, len(rows), 1000):
            yield LogitsChunk(first=first, first_id=0, logits=rows[first : first + 1000].bfloat16())


def pair() -> tuple[Fixed, Fixed]:
    """Two that disagree; either excludes an id that the other has, and both exclude one."""
    g = torch.Generator().manual_seed(0)
    rows = (torch.randn(2, V, generator=g) * 3).bfloat16().float()
    rows[0, 3], rows[1, 5], rows[:, 7] = -torch.inf, -torch.inf, -torch.inf
    return Fixed("a", rows[0]), Fixed("b", rows[1])


def mixed_in_float64(engines: tuple[Fixed, Fixed]) -> torch.Tensor:
    """0.75 of the first and 0.25 of the second."""
    first, second = (engine.row.double().softmax(-1) for engine in engines)
    return 0.75 * first + 0.25 * second


def test_logits_are_those_of_the_float64_mixture() -> None:
    engines = pair()
    mixture = MixtureEngine(engines, [3.0, 1.0])
    tokens = torch.zeros(3, 700, dtype=torch.int64)
    expected = mixed_in_float64(engines)
    found = mixture.logits(tokens)
    assert found.shape == (3, 700, V) and found.dtype == torch.float32
    torch.testing.assert_close(found[2, 5].double().softmax(-1), expected, rtol=1e-6, atol=1e-9)
    assert found[0, 0, 7] == -torch.inf and torch.isfinite(found[0, 0, 3])
    chunks = list(mixture.chunks(tokens))
    assert [(c.first, len(c.logits)) for c in chunks] == [(0, 1000), (1000, 1000), (2000, 100)]
    assert torch.equal(torch.cat([c.logits for c in chunks]), found.flatten(0, 1))


@pytest.mark.parametrize("sampler", ["multinomial", "systematic", "topk"])
def test_what_is_drawn_has_the_frequencies_of_the_mixture(sampler: str) -> None:
    engines = pair()
    mixture = MixtureEngine(engines, [3.0, 1.0])
    count, draws = 6000, 8
    logits = mixture.logits(torch.zeros(1, count, dtype=torch.int64))[0]
    (targets,) = sample_columns(
        host_columns(logits),
        np.arange(count, dtype=np.uint64),
        [Sampler(name=sampler, num_draws=draws, seed=4)],
    )
    expected = mixed_in_float64(engines).numpy()
    found = np.bincount(targets.ids, targets.probs(), minlength=V) / count
    if sampler == "topk":
        kept = np.argsort(-expected)[:draws]
        np.testing.assert_allclose(found[kept], expected[kept], rtol=2e-6)
        return
    # The error of a multinomial mean; that of systematic draws is smaller.
    error = np.sqrt(expected * (1 - expected) / (count * draws))
    assert (np.abs(found - expected) <= 4.5 * error + 1e-9).all()
    # Far more than the distance to either teacher, or to the mean of their logits.
    others = [engine.row.double().softmax(-1).numpy() for engine in engines]
    others.append(sum(0.5 * engine.row.double() for engine in engines).softmax(-1).numpy())
    assert all((np.abs(found - other) > 20 * error).any() for other in others)


def test_an_interrupted_capture_resumes_to_the_bytes_of_an_unbroken_one(
    sequences,  # noqa: F811
    tmp_path: Path,
) -> None:
    class Other(BatchSensitive):
        def logits(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().logits(tokens).flip(-1)

    def mixture(calls: int | None = None, weight: float = 2.0) -> MixtureEngine:
        return MixtureEngine([BatchSensitive(calls), Other()], [1.0, weight])

    expected = capture(tmp_path / "whole", sequences, mixture())
    with pytest.raises(KeyboardInterrupt):
        capture(tmp_path / "broken", sequences, mixture(calls=3))
    with pytest.raises(CacheError, match="teacher"):
        capture(tmp_path / "broken", sequences, mixture(weight=1.0))
    assert capture(tmp_path / "broken", sequences, mixture()) == expected
    assert capture(tmp_path / "alone", sequences, BatchSensitive()) != expected


def test_the_identity_has_all_teachers_and_their_shares() -> None:
    a, b = pair()
    found = MixtureEngine([a, b], [3.0, 1.0]).identity
    assert found == {
        "kind": "mixture",
        "teachers": [
            {"share": 0.75, "kind": "hf", "name": "a"},
            {"share": 0.25, "kind": "hf", "name": "b"},
        ],
    }
    assert MixtureEngine([a, b], [6.0, 2.0]).identity == found
    assert set(software_versions("hf", "megatron")) == set(software_versions("hf")) | set(
        software_versions("megatron")
    )


def test_teachers_that_are_split_cannot_be_mixed() -> None:
    a, b = pair()
    b.replica = Replica(group=object())  # type: ignore[assignment, arg-type]
    with pytest.raises(ConfigError, match="whole in each process"):
        MixtureEngine([a, b], [1.0, 1.0])
    for settings in ({"tensor": 2}, {"kind": "deepspeed"}):
        with pytest.raises(ValidationError, match="whole in each process"):
            TeacherConfig(**{"kind": "hf", "path": "a", "mixture": [{"path": "b"}], **settings})


def test_every_teacher_of_the_recipe_is_opened_with_its_own_settings(monkeypatch) -> None:
    opened: list[tuple[str, str, str]] = []

    def open_teacher_engine(teacher: TeacherConfig, **_: Any) -> Fixed:
        opened.append((teacher.kind, str(teacher.path), teacher.dtype))
        return pair()[len(opened) - 1]

    monkeypatch.setattr("distill_pretrain.teacher.engines.open_teacher_engine", open_teacher_engine)
    corpus: Any = SimpleNamespace(
        vocab_size=V,
        plan=SimpleNamespace(seq_len=8, document_end=None),
        tokenizer_digests=(),
    )
    config = TeacherConfig(
        kind="hf",
        path="a",
        weight=3.0,
        mixture=[{"path": "b", "kind": "megatron", "dtype": "bf16"}],
    )
    engine = loading.load_replica(config, corpus, Path("text"))
    assert opened == [("hf", "a", "fp32"), ("megatron", "b", "bf16")]
    assert [one["share"] for one in engine.identity["teachers"]] == [0.75, 0.25]


def test_a_teacher_of_another_tokenizer_is_refused_by_name(monkeypatch) -> None:
    def require_own_tokenizer(model: Path, tokens: Path) -> None:
        if model == Path("b"):
            raise TokenizerMismatch("another tokenizer", where=model)

    monkeypatch.setattr(loading, "require_own_tokenizer", require_own_tokenizer)
    monkeypatch.setattr(
        "distill_pretrain.teacher.engines.open_teacher_engine", lambda *_, **__: pair()[0]
    )
    corpus: Any = SimpleNamespace(
        vocab_size=V, plan=SimpleNamespace(seq_len=8), tokenizer_digests=()
    )
    config = TeacherConfig(kind="hf", path="a", mixture=[{"path": "b"}])
    with pytest.raises(TokenizerMismatch, match="where: b"):
        loading.load_replica(config, corpus, Path("text"))
