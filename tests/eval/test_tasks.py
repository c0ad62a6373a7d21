from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_models import TableEngine

from distill_pretrain.errors import ConfigError, MissingDependency
from distill_pretrain.eval.tasks import TaskError, run_tasks

TASKS = Path(__file__).parent / "tasks"
MAX_LENGTH = 9


class Letters:
    """One token per letter, space 26, end of document 27."""

    bos_id: int | None = None
    eod_id = 27

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[26 if c == " " else ord(c) - ord("a") for c in text] for text in texts]


class PairEngine(TableEngine):
    """Logits that depend on the last two tokens, so that lost or shifted context shows."""

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        table = torch.from_numpy(self.table)
        before = torch.cat((tokens[:, :1], tokens[:, :-1]), dim=1)
        return table[tokens] + 0.5 * table.T[before]


def direct(engine: PairEngine, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-probability in float64, token by token, each with the tokens the model can see."""
    whole = (context + continuation)[-(MAX_LENGTH + 1) :]
    table, total, greedy = engine.table.astype(np.float64), 0.0, True
    for place in range(max(1, len(whole) - len(continuation)), len(whole)):
        seen = whole[:place]
        z = table[seen[-1]] + 0.5 * table.T[seen[-2] if place > 1 else seen[-1]]
        total += z[whole[place]] - math.log(np.exp(z).sum())
        greedy &= int(z.argmax()) == whole[place]
    return total, greedy


def documents() -> list[dict]:
    return [json.loads(line) for line in (TASKS / "next_letter.jsonl").read_text().splitlines()]


@pytest.fixture
def in_task_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data files of a task are found from the working directory."""
    monkeypatch.chdir(TASKS)


def harness_model(engine: TableEngine, batch_size: int = 4):
    from distill_pretrain.eval.harness_model import HarnessModel

    return HarnessModel(engine, Letters(), max_length=MAX_LENGTH, batch_size=batch_size)


def run(engines: dict[str, TableEngine], *tasks: str, tasks_path: Path | None = TASKS):
    return run_tasks(
        engines, Letters(), tasks, tasks_path=tasks_path, max_length=MAX_LENGTH, batch_size=4
    )


def request(*args: str) -> SimpleNamespace:
    return SimpleNamespace(args=args)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_loglikelihoods_are_those_of_the_logits(batch_size: int) -> None:
    engine = PairEngine(3)
    pairs = [(d["text"], choice) for d in documents() for choice in d["choices"]]
    pairs.append(("ab", "a continuation longer than all the model sees"))
    greedy = "".join("abcdefghijklmnopqrstuvwxyz  "[i] for i in most_likely(engine, [0, 1], 3))
    pairs.append(("ab", greedy))
    found = harness_model(engine, batch_size).loglikelihood(
        [request(*pair) for pair in pairs], True
    )
    encode = Letters().encode
    for (context, continuation), (logprob, is_greedy) in zip(pairs, found, strict=True):
        spaces = len(context) - len(context.rstrip())  # these belong to the continuation
        moved = context[len(context) - spaces :] + continuation
        left = context[: len(context) - spaces]
        ids = encode([left])[0] or [Letters.eod_id]
        expected, expected_greedy = direct(engine, ids, encode([moved])[0])
        assert logprob == pytest.approx(expected, rel=1e-5), (context, continuation)
        assert is_greedy == expected_greedy
    assert found[-1][1]


def test_texts_begin_with_the_token_that_the_documents_of_the_corpus_begin_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Letters, "bos_id", 25)
    engine = PairEngine(5)
    encode = Letters().encode
    model = harness_model(engine)
    pairs = [("", "ab"), ("a", "cd")]  # the engine sees two tokens back
    found = model.loglikelihood([request(*pair) for pair in pairs], True)
    for (context, continuation), (logprob, _) in zip(pairs, found, strict=True):
        ids = [25, *encode([context])[0]]
        assert logprob == pytest.approx(direct(engine, ids, encode([continuation])[0])[0], rel=1e-5)
    (rolling,) = model.loglikelihood_rolling([request("abc")])
    assert rolling == pytest.approx(direct(engine, [25], encode(["abc"])[0])[0], rel=1e-5)


def most_likely(engine: PairEngine, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    engine.table[:, 26:] = -9  # letters only
    for _ in range(count):
        ids.append(int(engine.logits(torch.tensor([ids]))[0, -1, :26].argmax()))
    return ids[-count:]


def test_rolling_likelihood_scores_every_token_once_after_the_end_of_document() -> None:
    engine = PairEngine(3)
    texts = ["a", "abcdefgh", "a text of more than twice what fits"]
    found = harness_model(engine).loglikelihood_rolling([request(text) for text in texts])
    for text, logprob in zip(texts, found, strict=True):
        ids, expected = [Letters.eod_id, *Letters().encode([text])[0]], 0.0
        for start in range(0, len(ids) - 1, MAX_LENGTH):
            scored = ids[start + 1 : start + 1 + MAX_LENGTH]
            # A last window shorter than the others sees as much of what came before as fits.
            seen = ids[max(0, start + len(scored) - MAX_LENGTH) : start + 1]
            expected += direct(engine, seen, scored)[0]
        assert logprob == pytest.approx(expected, rel=1e-5), text


def test_figures_of_local_tasks_are_those_of_the_logits(in_task_folder: None) -> None:
    engines = {"a": PairEngine(1), "b": PairEngine(2)}
    found = run(engines, "next_letter", str(TASKS / "whole_text.yaml"))
    assert list(found) == ["a", "b"]
    encode = Letters().encode
    for name, engine in engines.items():
        right, total, size = 0, 0.0, 0
        for document in documents():
            text = document["text"]
            ids = encode([text.rstrip()])[0] or [Letters.eod_id]
            moved = " " if text.endswith(" ") else ""
            scores = [direct(engine, ids, encode([moved + c])[0])[0] for c in document["choices"]]
            right += int(np.argmax(scores)) == document["answer"]
            whole = text + document["choices"][0]
            total += harness_model(engine).loglikelihood_rolling([request(whole)])[0]
            size += len(whole)
        assert found[name]["next_letter"]["acc"] == pytest.approx(right / len(documents()))
        assert "acc_stderr" in found[name]["next_letter"]
        perplexity = found[name]["whole_text"]["byte_perplexity"]
        assert perplexity == pytest.approx(math.exp(-total / size), rel=1e-6)
    assert found["a"] != found["b"]


def test_unusable_tasks_are_named(in_task_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = {"a": PairEngine(1)}
    with pytest.raises(ConfigError, match=r"generates text.*generates"):
        run(engines, "generates")
    with pytest.raises(ConfigError, match=r"no such task.*nowhere\.yaml"):
        run(engines, "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"eval\.tasks_path"):
        run(engines, "next_letter", tasks_path=Path("nowhere"))
    monkeypatch.chdir("/")
    with pytest.raises(TaskError, match=r"next_letter.*HF_HUB_OFFLINE=1"):
        run(engines, "next_letter")


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name)
    )
    with pytest.raises(MissingDependency, match=r"distill-pretrain\[tasks\]"):
        run({"a": PairEngine(1)}, "next_letter")
