"""Measures the resident memory of `eval`, beside what `plan` foresees.

    python tools/bench_evaluation.py [--before COMMIT] [--output FILE.json]

Two students and a teacher of random weights (llama, a vocabulary of 49,152) score random tokens in one process, and, in
parts, in two. Peak resident memory (ru_maxrss) of the process that has most. With --before the same recipe is run by
the package at another commit too, where it can run it. Prints Markdown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml
from reporting import command_line, environment, write_json

from distill_pretrain.corpus.token_writer import TokenIndexWriter

HERE = Path(__file__).parents[1]
VOCAB_SIZE, SEQ_LEN, HIDDEN, INNER, LAYERS = 49_152, 512, 256, 704, 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One evaluation.

    Attributes:
        name: for the table.
        processes: of the job.
        settings: of the section eval.
        teacher: of the section teacher.
        ran_before: whether an older package can be asked for it.
    """

    name: str
    processes: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    ran_before: bool = True


CASES = (
    Case(name="1 sequence a pass", settings={"micro_batch_size": 1}),
    Case(name="4 sequences a pass", settings={"micro_batch_size": 4}),
    Case(
        name="4 sequences a pass, tensor 2",
        processes=2,
        settings={"micro_batch_size": 4, "tensor": 2},
        teacher={"tensor": 2},
        ran_before=False,
    ),
    Case(
        name="4 sequences a pass, pipeline 2",
        processes=2,
        settings={"micro_batch_size": 4, "pipeline": 2},
        teacher={"pipeline": 2},
        ran_before=False,
    ),
)


def write_inputs(folder: Path) -> None:
    """Tokens, two students and a teacher."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    draw = np.random.default_rng(0)
    with TokenIndexWriter(folder / "held_out", VOCAB_SIZE) as writer:
        writer.add_document(draw.integers(VOCAB_SIZE, size=4 * SEQ_LEN + 1))
    for seed, name in enumerate(("a", "b", "teacher")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=SEQ_LEN,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)


def recipe_of(folder: Path, case: Case, output: str) -> Path:
    """The recipe's file."""
    recipe = {
        "data": {
            "tokens": str(folder / "held_out"),
            "held_out_tokens": str(folder / "held_out"),
            "vocab_size": VOCAB_SIZE,
            "seq_len": SEQ_LEN,
        },
        "teacher": {"kind": "megatron", "path": str(folder / "teacher"), **case.teacher},
        "eval": {
            "models": {name: str(folder / name) for name in ("a", "b")},
            "output": str(folder / output),
            "num_sequences": 4,
            **case.settings,
        },
    }
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def settings_of(tree: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}


def peak_gb(tree: Path, recipe: Path, processes: int) -> float:
    """Run an evaluation with a checkout's package; the most resident memory of any of its processes, in 1e9 bytes."""
    log = recipe.with_suffix(".log")
    port = str(20_000 + os.getpid() % 10_000)
    ranks = []
    with log.open("w") as output:
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            job = {**own, **sizes, "MASTER_PORT": port} if processes > 1 else {}
            command = [sys.executable, "-m", "distill_pretrain", "eval", str(recipe)]
            ranks.append(
                subprocess.Popen(
                    command,
                    cwd=tree,
                    env={**settings_of(tree), **job},
                    stdout=output,
                    stderr=output,
                )
            )
        peaks = []
        for rank in ranks:
            _, status, usage = os.wait4(rank.pid, 0)
            rank.returncode = os.waitstatus_to_exitcode(status)
            if rank.returncode:
                raise SystemExit(f"{recipe}: {log.read_text()[-2000:]}")
            peaks.append(usage.ru_maxrss * 1024 / 1e9)
    return max(peaks)


def foreseen_gb(recipe: Path) -> dict[str, float]:
    """What `plan` says of the recipe: name of a figure -> 1e9 bytes."""
    command = [sys.executable, "-m", "distill_pretrain", "plan", str(recipe), "--json"]
    text = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=HERE, env=settings_of(HERE)
    ).stdout
    return {
        figure["name"].removeprefix("evaluation "): figure["value"] / 1e9
        for part in json.loads(text)["parts"]
        for figure in part["figures"]
        if figure["name"].startswith("evaluation ")
    }


def checked_out(commit: str, folder: Path) -> Path:
    """The repository at a commit, in a folder of its own."""
    folder.mkdir()
    packed = subprocess.run(
        ["git", "archive", commit], check=True, capture_output=True, cwd=HERE
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], check=True, input=packed)
    return folder


def main() -> None:
    """Measure, print, write."""
    parser = command_line(__doc__, recipe=False)
    parser.add_argument("--before", metavar="COMMIT")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        before = checked_out(arguments.before, folder / "before") if arguments.before else None
        for number, case in enumerate(CASES):
            row: dict[str, Any] = {"case": case.name}
            if before is not None and case.ran_before:
                recipe = recipe_of(folder, case, f"before-{number}.json")
                row["before_gb"] = peak_gb(before, recipe, case.processes)
            recipe = recipe_of(folder, case, f"after-{number}.json")
            row["foreseen_gb"] = foreseen_gb(recipe)
            row["measured_gb"] = peak_gb(HERE, recipe, case.processes)
            rows.append(row)
    print("| evaluation | before, GB | now, GB | foreseen by `plan`, GB | foreseen / now |")
    print("|:--|--:|--:|--:|--:|")
    for row in rows:
        foreseen, now = row["foreseen_gb"]["process on a CPU"], row["measured_gb"]
        earlier = f"{row['before_gb']:.2f}" if "before_gb" in row else ""
        print(
            f"| {row['case']} | {earlier} | {now:.2f} | {foreseen:.2f} | {foreseen / now - 1:+.0%} |"
        )
    sizes = {"vocab_size": VOCAB_SIZE, "seq_len": SEQ_LEN, "hidden_size": HIDDEN, "models": 3}
    packages = environment("torch", "megatron-core", "transformers")
    write_json(arguments.output, {**packages, "before": arguments.before, **sizes, "cases": rows})


if __name__ == "__main__":
    main()
