from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_cache import VOCAB, SmallCache, make_small_cache

import distill_pretrain.eval.tasks
import distill_pretrain.mcore.runtime.parallel
import distill_pretrain.teacher.engines
from distill_pretrain.cli.main import main
from distill_pretrain.contracts import LogitsChunk
from distill_pretrain.corpus.sequence_plan import SequencePlan
from distill_pretrain.corpus.token_index import TokenIndex
from distill_pretrain.eval import gradient_figures
from distill_pretrain.files import ownership
from distill_pretrain.files.ownership import owner_beside
from tests.support.owner import owned_elsewhere


class ScaledTable:
    """Random bigram logits; the file's text names the seed."""

    device = torch.device("cpu")

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.text = path.read_text()
        rng = np.random.default_rng(int(self.text))
        self.table = torch.from_numpy(rng.standard_normal((VOCAB, vocab_size)).astype(np.float32))

    @property
    def identity(self) -> dict[str, Any]:
        return {"text": self.text}

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens]

    def chunks(self, tokens: torch.Tensor) -> Iterator[LogitsChunk]:
        yield LogitsChunk(first=0, first_id=0, logits=self.logits(tokens).flatten(0, 1))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Engines without megatron-core; lists what was opened."""
    calls: list[tuple[str, str, str]] = []

    def open_engine(kind: str, path: Path, dtype: str, **options: Any) -> ScaledTable:
        assert options["tokenizer_digests"] == ("d" * 64,)
        calls.append((kind, path.name, dtype))
        return ScaledTable(path, options["vocab_size"])

    @contextmanager
    def no_groups(parallel: object, *, seed: int):
        yield None

    monkeypatch.setattr(distill_pretrain.teacher.engines, "open_engine", open_engine)
    monkeypatch.setattr(distill_pretrain.mcore.runtime.parallel, "model_parallel", no_groups)
    return calls


@pytest.fixture
def recipe(small_cache: SmallCache) -> Path:
    root = small_cache.recipe.parent
    for name, seed in (("a", "1"), ("b", "2"), ("t", "3")):
        (root / name).write_text(seed)
    with small_cache.recipe.open("a") as file:
        file.write(
            f"teacher: {{path: {root / 't'}, dtype: bf16}}\n"
            f"eval: {{models: {{a: {root / 'a'}, b: {root / 'b'}}}, output: {root / 'out' / 'eval.json'}}}\n"
        )
    return small_cache.recipe


def run(recipe: Path, *overrides: str) -> int:
    tokens = recipe.parent / "tokens" / "train"
    return main(["eval", str(recipe), f"data.held_out_tokens={tokens}", *overrides])


def figures(recipe: Path) -> dict[str, Any]:
    return json.loads((recipe.parent / "out" / "eval.json").read_text())


def test_figures_are_written_with_all_that_decides_them(
    recipe: Path, opened: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe) == 0
    assert opened == [
        ("megatron", "t", "bf16"),
        ("megatron", "a", "fp32"),
        ("megatron", "b", "fp32"),
    ]
    values = figures(recipe)
    assert list(values["scores"]) == ["a", "b", "teacher"]
    assert values["scores"]["a"]["num_positions"] == 74
    assert values["inputs"]["models"]["b"]["identity"] == {"text": "2"}
    assert values["inputs"]["teacher"]["identity"] == {"text": "3"}
    assert set(values["scores"]["a"]["accepted_length"]) == {"2", "4", "8"}
    assert len(values["scores"]["a"]["reliability"]["positions"]) == 15
    out = capsys.readouterr().out
    for figure, form in (("kl", ".4f"), ("ece", ".2%"), ("acceptance", ".1%")):
        assert format(values["scores"]["b"][figure], form) in out
    beside = recipe.parent / "out" / "eval.json.recipe.yaml"
    assert "held_out_tokens" in beside.read_text()


def test_the_same_inputs_are_not_scored_again(
    recipe: Path, opened: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run(recipe)
    path = recipe.parent / "out" / "eval.json"
    first = path.stat().st_mtime_ns
    assert run(recipe, "eval.micro_batch_size=2") == 0
    assert path.stat().st_mtime_ns == first
    assert "already done" in capsys.readouterr().out
    (recipe.parent / "b").write_text("5")
    before = figures(recipe)
    assert run(recipe) == 0
    assert figures(recipe)["scores"]["b"] != before["scores"]["b"]
    assert run(recipe, "eval.num_sequences=2") == 0
    assert figures(recipe)["inputs"]["num_sequences"] == 2
    path.write_text("{}")
    assert run(recipe) == 0
    assert figures(recipe)["scores"]["a"] == before["scores"]["a"]


def test_a_teacher_listed_as_a_model_runs_once(recipe: Path, opened: list[Any]) -> None:
    root = recipe.parent
    assert run(recipe, f"eval.models={{teacher: {root / 't'}, a: {root / 'a'}}}") == 0
    assert [name for _, name, _ in opened] == ["t", "a"]
    assert list(figures(recipe)["scores"]) == ["a", "teacher"]
    assert run(recipe, f"eval.models.teacher={root / 'b'}") == 2


def test_without_a_teacher(recipe: Path, opened: list[Any]) -> None:
    assert run(recipe, "teacher=null") == 0
    values = figures(recipe)
    assert list(values["scores"]) == ["a", "b"]
    assert values["scores"]["a"]["kl"] is None
    assert set(values["paired"]["a"]["b"]) == {"ce"}


def test_bins_and_draft_lengths_are_settings(recipe: Path, opened: list[Any]) -> None:
    run(recipe)
    assert run(recipe, "eval.ece_bins=4", "eval.draft_lengths=[3,1,3]") == 0
    score = figures(recipe)["scores"]["a"]
    assert score["reliability"]["bins"] == [0, 0.25, 0.5, 0.75, 1]
    assert list(score["accepted_length"]) == ["1", "3"]


def test_models_are_scored_against_a_cache_of_the_held_out_text(
    recipe: Path, opened: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = recipe.parent / "cache"
    assert run(recipe, "teacher=null", f"eval.cache={cache}") == 0
    values = figures(recipe)
    assert "KL(cache||model)" in capsys.readouterr().out
    for name, engine in {n: ScaledTable(recipe.parent / n, VOCAB) for n in ("a", "b")}.items():
        cross, entropy, count = cache_figures(recipe.parent, engine)
        score = values["scores"][name]
        assert score["num_cache_positions"] == count > 20
        assert score["cross_entropy_cache"] == pytest.approx(cross, rel=1e-6)
        assert score["kl_cache"] == pytest.approx(cross - entropy, rel=1e-5)
    assert set(values["paired"]["a"]["b"]) == {"ce", "cross_entropy_cache"}
    assert values["inputs"]["cache"]["sampler"]["name"] == "systematic"


def cache_figures(root: Path, engine: ScaledTable) -> tuple[float, float, int]:
    """-sum t log p, -sum t log t and positions of small_cache's targets: id 0 has 2 of 6 draws, the other one 4."""
    plan = SequencePlan(TokenIndex.open(root / "tokens" / "train"), seq_len=16, seed=7)
    logprobs = torch.log_softmax(engine.table.double(), -1).numpy()
    cross, entropy, count = 0.0, 0.0, 0
    for sequence in range(plan.num_sequences):
        tokens, labels = (rows[0] for rows in plan.read(np.array([sequence])))
        for token, label in zip(tokens, labels, strict=True):
            if label >= 0:
                row = logprobs[token]
                cross -= 1 / 3 * row[0] + 2 / 3 * row[label - label % 2]
                entropy -= 1 / 3 * np.log(1 / 3) + 2 / 3 * np.log(2 / 3)
                count += 1
    return cross / count, entropy / count, count


def test_a_cache_of_another_text_is_refused(
    recipe: Path, opened: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = recipe.parent / "cache"
    assert run(recipe, f"eval.cache={cache}", "data.seed=8") == 2
    error = capsys.readouterr().err
    assert "eval.cache" in error and "data.held_out_tokens" in error
    shifted = make_small_cache(recipe.parent / "shifted", shift=1)
    assert run(recipe, f"eval.cache={shifted.folder}") == 2
    assert "the tokens differ from those the teacher saw" in capsys.readouterr().err
    assert not (recipe.parent / "out").exists()


def test_another_text_is_scored_too_and_kept(
    recipe: Path, opened: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_small_cache(recipe.parent / "code", seed=5).tokens
    wanted = f"eval.out_of_domain_tokens={other}"
    assert run(recipe, wanted) == 0
    assert "out of domain" in capsys.readouterr().out
    found = figures(recipe)
    # The same as with that text in the first one's place.
    assert (
        run(recipe, f"eval.output={recipe.parent / 'alone.json'}", f"data.held_out_tokens={other}")
        == 0
    )
    alone = json.loads((recipe.parent / "alone.json").read_text())
    assert found["out_of_domain"] == {k: alone[k] for k in ("inputs", "scores", "paired")}
    assert found["scores"] != alone["scores"]
    assert run(recipe, wanted) == 0
    assert "already done" in capsys.readouterr().out
    assert run(recipe) == 0
    assert figures(recipe) == {**found, "out_of_domain": None}


def test_another_text_of_another_tokenizer_is_refused(
    recipe: Path, opened: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_small_cache(recipe.parent / "code").tokens
    record = other.parent / "tokens.json"
    record.write_text(record.read_text().replace("d" * 64, "e" * 64))
    assert run(recipe, f"eval.out_of_domain_tokens={other}") == 2
    assert "the two held-out corpora were made with different tokenizers" in capsys.readouterr().err
    record.write_text(
        record.read_text().replace("e" * 64, "d" * 64).replace('"eod_id":2', '"eod_id":1')
    )
    assert run(recipe, f"eval.out_of_domain_tokens={other}", "data.documents=separate") == 2
    assert "end their documents with different tokens" in capsys.readouterr().err
    assert run(recipe, f"eval.out_of_domain_tokens={recipe.parent / 'none'}") == 2
    assert not (recipe.parent / "out").exists()


def test_copying_is_probed_with_ids_of_the_held_out_text(
    recipe: Path, opened: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    seen: list[torch.Tensor] = []
    logits = ScaledTable.logits

    def noted(self: ScaledTable, tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens)
        return logits(self, tokens)

    monkeypatch.setattr(ScaledTable, "logits", noted)
    plan = SequencePlan(TokenIndex.open(recipe.parent / "tokens" / "train"), seq_len=16, seed=7)
    labels = plan.read(np.arange(plan.num_sequences))[1]
    ids, counts = np.unique(labels[labels >= 0], return_counts=True)
    end = ids[counts.argmax()]  # what ends documents is not drawn, however often it is there
    record = recipe.parent / "tokens" / "tokens.json"
    record.write_text(record.read_text().replace('"eod_id":2', f'"eod_id":{end}'))
    wanted = "eval.copying={num_sequences: 6}"
    assert run(recipe, wanted) == 0
    found = figures(recipe)["copying"]
    assert list(found["models"]) == ["a", "b", "teacher"]
    assert found["inputs"]["length"] == 8
    twice = next(
        tokens
        for tokens in seen
        if tokens.shape == (6, 16) and (tokens[0, :8] == tokens[0, 8:]).all()
    )
    assert (twice[:, :8] == twice[:, 8:]).all()
    assert set(twice.flatten().tolist()) <= set(ids.tolist()) - {end}
    once = twice[:, :8].numpy()
    logprobs = torch.log_softmax(ScaledTable(recipe.parent / "b", VOCAB).table.double(), -1)
    expected = -logprobs[once[:, :-1], once[:, 1:]].mean().item()
    row = found["models"]["b"]
    assert (row["first"], row["repeated"]) == pytest.approx((expected, expected), rel=1e-6)
    assert row["kl"] > 0 == found["models"]["teacher"]["kl"]
    assert f"{row['repeated']:.4f}" in capsys.readouterr().out
    assert run(recipe, wanted) == 0
    assert "already done" in capsys.readouterr().out
    assert run(recipe, "eval.copying={num_sequences: 6, seed: 2}") == 0
    assert figures(recipe)["copying"]["models"]["b"] != row
    assert run(recipe, "eval.copying={length: 9}") == 2
    assert "expected: 2 to 8" in capsys.readouterr().err
    assert run(recipe, "eval.copying={}") == 0
    assert figures(recipe)["copying"]["inputs"]["num_sequences"] == 64


def test_gradients_are_compared_once_and_kept(
    recipe: Path,
    opened: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    taken: list[int] = []

    class Student:
        """Logits with gradients, without megatron-core."""

        sha256 = "e" * 64
        device = torch.device("cpu")

        def __init__(self, path: Path, *, vocab_size: int) -> None:
            self.vocab_size = vocab_size
            self.parameters = [ScaledTable(path, vocab_size).table.requires_grad_()]

        def logits_with_grad(self, tokens: torch.Tensor) -> torch.Tensor:
            taken.append(len(tokens))
            return self.parameters[0][tokens]

    monkeypatch.setattr(gradient_figures, "CheckpointStudent", Student)
    root = recipe.parent
    settings = f"model: {root / 'a'}, caches: {{draws: {root / 'cache'}}}, micro_batch_size: 2"
    wanted = f"eval.gradients={{{settings}, num_batches: [2, 1]}}"
    assert run(recipe, wanted) == 0
    rows = figures(recipe)["gradients"]["caches"]["draws"]
    assert [row["num_batches"] for row in rows] == [1, 2]
    assert all(0 < row["angle_degrees"] < 180 and row["norm_ratio"] > 0 for row in rows)
    assert f"{rows[1]['angle_degrees']:.1f}" in capsys.readouterr().out
    assert taken == [2, 2]
    scores = figures(recipe)["scores"]
    assert run(recipe, wanted) == 0
    assert "already done" in capsys.readouterr().out
    assert run(recipe, wanted, "eval.num_sequences=2") == 0
    assert taken == [2, 2]
    assert figures(recipe)["scores"] != scores
    assert run(recipe, wanted.replace("[2, 1]", "[40]")) == 2
    assert "too few sequences" in capsys.readouterr().err
    assert run(recipe, wanted, "teacher=null") == 2
    assert "no section teacher" in capsys.readouterr().err


def test_tasks_are_run_with_the_tokenizer_of_the_tokens(
    recipe: Path, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def run_tasks(models: Any, tokenizer: Any, tasks: Any, **options: Any) -> Any:
        calls.append((list(models), tokenizer, tasks, options))
        return {name: {"quiz": {"acc": 0.5}} for name in models}

    monkeypatch.setattr(distill_pretrain.eval.tasks, "run_tasks", run_tasks)
    monkeypatch.setattr(distill_pretrain.eval.tasks, "require_harness", lambda: None)
    monkeypatch.setattr(
        distill_pretrain.eval.tasks,
        "load_recorded_tokenizer",
        lambda folder, record: (folder.name, record.tokenizer["sha256"]),
    )
    assert run(recipe, "eval.tasks=[quiz]", "eval.tasks_path=here") == 0
    names, tokenizer, tasks, options = calls[0]
    assert names == ["a", "b", "teacher"]
    assert tokenizer == ("tokens", "d" * 64)
    assert tasks == ("quiz",)
    assert options == {"tasks_path": Path("here"), "max_length": 16, "batch_size": 8}
    assert figures(recipe)["tasks"]["models"]["b"] == {"quiz": {"acc": 0.5}}


def test_an_output_that_cannot_be_written_is_found_before_anything_is_scored(
    recipe: Path, opened: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def score(*_: object, **__: object) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr(ScaledTable, "logits", score)
    output = recipe.parent / "taken" / "eval.json"
    output.mkdir(parents=True)
    assert run(recipe, f"eval.output={output}") == 2
    error = capsys.readouterr().err
    assert f"a folder is where a file should be; where: {output};" in error
    assert run(recipe, f"eval.output={recipe}/eval.json") == 2  # a file in place of the folder
    error = capsys.readouterr().err
    assert f"a file is where a folder should be; where: {recipe};" in error
    assert "Traceback" not in error


def test_one_process_at_a_time_writes_an_output(
    recipe: Path, opened: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(ownership, "PATIENCE_S", 0.2)
    output = recipe.parent / "out" / "eval.json"
    with owned_elsewhere(owner_beside(output)) as holder:
        assert run(recipe) == 2
    assert f"process {holder.pid} on node7" in capsys.readouterr().err
    assert run(recipe) == 0
    assert sorted(p.name for p in output.parent.iterdir()) == [
        output.name,
        f"{output.name}.recipe.yaml",
    ]


def test_no_held_out_text(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(recipe, "data.held_out_tokens=null") == 2
    assert "data.held_out_tokens" in capsys.readouterr().err
