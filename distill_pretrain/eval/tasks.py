"""Zero-shot tasks through lm-evaluation-harness (package lm-eval, optional)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_pretrain.contracts import LogitsEngine
from distill_pretrain.corpus.recorded_tokenizer import load_recorded_tokenizer
from distill_pretrain.corpus.tokens_record import TokensRecord
from distill_pretrain.errors import ConfigError, DistillPretrainError, MissingDependency
from distill_pretrain.processes.process import on_first_rank

if TYPE_CHECKING:
    from distill_pretrain.eval.config import EvalConfig
    from distill_pretrain.eval.harness_model import TextTokenizer

_BOOTSTRAP_ITERATIONS = 1000


class TaskError(DistillPretrainError):
    """A zero-shot task cannot be loaded."""


def require_harness() -> None:
    """Raise MissingDependency when no task could be run."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependency("lm-eval", extra="tasks", needed_for="eval.tasks")


def task_figures(
    config: EvalConfig, tokens: Path, models: Mapping[str, LogitsEngine], *, max_length: int
) -> dict[str, Any]:
    """Run the tasks of eval.tasks on rank 0, and return their figures on every rank.

    They are run anew each time: the files of a task may have changed.

    Args:
        config: the section; it names the tasks.
        tokens: prefix of the .bin/.idx whose tokenizer is the models'.
        models: name -> model.
        max_length: tokens that a model sees at once.

    Returns:
        {"inputs", "models": what `run_tasks` returns}.

    Raises:
        ConfigError: the tokenizer is unknown; see also `run_tasks`.
    """
    record = TokensRecord.beside(tokens)
    if record is None:
        raise ConfigError(
            "tasks are text, and the models' tokenizer is unknown",
            where="eval.tasks",
            found=f"no tokens.json beside {tokens}",
            remedy="tokenise the held-out text with `distill-pretrain tokenize`",
        )
    tokenizer = load_recorded_tokenizer(tokens.parent, record)
    # A task's texts are one document each: an engine that is shown documents one by one has nothing to divide.
    models = {name: getattr(engine, "engine", engine) for name, engine in models.items()}
    found = on_first_rank(
        lambda: run_tasks(
            models,
            tokenizer,
            config.tasks,
            tasks_path=config.tasks_path,
            max_length=max_length,
            batch_size=config.micro_batch_size,
        )
    )
    inputs = {
        "tasks": list(config.tasks),
        "tasks_path": None if config.tasks_path is None else str(config.tasks_path),
        "num_fewshot": 0,
        "max_length": max_length,
        "models": {name: engine.identity for name, engine in models.items()},
    }
    return {"inputs": inputs, "models": found}


def run_tasks(
    engines: Mapping[str, LogitsEngine],
    tokenizer: TextTokenizer,
    tasks: Sequence[str],
    *,
    tasks_path: Path | None,
    max_length: int,
    batch_size: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """Run every model through every task, without examples in the prompt.

    Args:
        engines: name -> model.
        tokenizer: of all models.
        tasks: names, or paths of YAML files.
        tasks_path: folder of further YAML files; None for those of lm-eval alone.
        max_length: tokens that a model sees at once.
        batch_size: requests per forward pass.

    Returns:
        Name of the model -> name of the task -> metric (such as "acc", "acc_stderr") -> value.

    Raises:
        MissingDependency: lm-eval is not installed.
        ConfigError: no such task or folder, or one that generates text.
        TaskError: the data of a task cannot be loaded.
    """
    require_harness()
    from lm_eval import simple_evaluate

    from distill_pretrain.eval.harness_model import HarnessModel

    manager = _manager(tasks, tasks_path)
    for task in tasks:
        _check(manager, task)
    results = {}
    for name, engine in engines.items():
        model = HarnessModel(engine, tokenizer, max_length=max_length, batch_size=batch_size)
        found = simple_evaluate(
            model,
            tasks=list(tasks),
            num_fewshot=0,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=_BOOTSTRAP_ITERATIONS,
        )
        results[name] = {task: _figures(row) for task, row in found["results"].items()}
    return results


def _manager(tasks: Sequence[str], tasks_path: Path | None) -> Any:
    """Knows the tasks; those of lm-eval itself, whose thousands of files take seconds to list, only if needed."""
    from lm_eval.tasks import TaskManager

    if tasks_path is not None and not tasks_path.is_dir():
        raise ConfigError(
            "no folder of task YAML files here", where="eval.tasks_path", found=tasks_path
        )
    folder = None if tasks_path is None else str(tasks_path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if all(_is_file(task) or task in manager.all_tasks for task in tasks):
        return manager
    return TaskManager(include_path=folder)


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _check(manager: Any, task: str) -> None:
    """Raise unless the task and its data load, and it generates no text."""
    if not (Path(task).is_file() if _is_file(task) else task in manager.all_tasks):
        raise ConfigError(
            "no such task",
            where="eval.tasks",
            found=task,
            expected="a task of lm-eval (`lm_eval ls tasks`) or of eval.tasks_path, or a YAML file",
            remedy="correct the name or path",
        )
    try:
        loaded = manager.load([task])["tasks"]
    except Exception as error:  # datasets and the hub's client raise nearly anything here
        text = str(error).splitlines()
        raise TaskError(
            "the data of a task cannot be loaded",
            where=f"eval.tasks, {task}",
            found=f"{type(error).__name__}: {text[0] if text else ''}",
            expected="data in local files, or on the Hugging Face hub (which needs a network), or downloaded before",
            remedy='on a machine with a network run `python -c "from lm_eval.tasks import TaskManager; '
            f"TaskManager().load(['{task}'])\"`, copy the folder ~/.cache/huggingface from there (or set HF_HOME to "
            "a shared one), and set HF_HUB_OFFLINE=1; local data files are found from the working directory",
        ) from error
    generating = [
        name for name, one in loaded.items() if one.get_config("output_type") == "generate_until"
    ]
    if generating:
        raise ConfigError(
            "a task generates text, which the scoring engines cannot",
            where=f"eval.tasks, {task}",
            found=", ".join(generating),
            expected="tasks that score given texts (multiple_choice, loglikelihood, loglikelihood_rolling)",
            remedy="remove it, or run it on the exported model with lm_eval itself",
        )


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's {"acc,none": ..., "acc_stderr,none": ..., "alias": ...} -> {"acc": ..., "acc_stderr": ...}."""
    figures = {}
    for key, value in row.items():
        metric, _, kind = key.partition(",")
        if kind and isinstance(value, int | float):
            figures[metric if kind == "none" else f"{metric}, {kind}"] = float(value)
    return figures
