"""Training curves of every family under tensor, pipeline and expert parallelism, beside those of one process.

    python -m tools.family_curves --output docs/results/families/curves.json
    python -m tools.family_curves --only gpt_oss --output docs/results/families/curves.json

Students with the pieces of each family (tiny ones of tests/checkpoint/test_hf_conversion.py, whose windows and original
contexts are shorter than the sequences) learn from sparse targets in fp32, from the same fresh weights and in the same
order under every layout. It prints the largest difference of the loss over all steps, which is the table of
docs/results/families. With `--only`, rows that the file has of other families stay, if they were measured with the same
versions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_pretrain.checkpoint.hf import read_hf_model
from tests.checkpoint.test_hf_conversion import family_configs
from tests.support.distributed import run_distributed
from tests.support.layouts import run_cases
from tools.reporting import command_line, environment, kept_rows, run, write_json

STEPS = 20
NAMES = (
    *("gpt2-published", "llama-biased", "llama-yarn", "mistral-window", "qwen2", "qwen3-biased"),
    *("smollm3", "ministral3", "olmo2", "olmo3", "phi3", "gemma2", "gemma3"),
    *("qwen3_moe", "gpt_oss"),
)
"""Of `family_configs`, each family with what it may have."""
WITH_LIMIT: dict[str, tuple[str, float]] = {"gpt_oss-limit-7": ("gpt_oss", 7.0)}
"""Name -> one of NAMES, and where its clamped SwiGLU ends. A clamp's gradient jumps there: at the limit of the tests,
which thousands of values cross, curves of other orders of sums part when one of them falls on the other side."""
EVERY = (*NAMES, *WITH_LIMIT)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
    "TP2 x PP2": (4, {"tensor": 2, "pipeline": 2}),
    "EP2": (2, {"expert": 2}),
}
"""Name -> processes and section `parallel`."""
VERSIONS = ("torch", "megatron-core", "transformers")


def section(name: str) -> dict[str, Any]:
    """The section `model` of a family's student, with padded rows of the vocabulary."""
    config, limit = WITH_LIMIT.get(name, (name, None))
    with tempfile.TemporaryDirectory() as folder:
        family_configs()[config].save_pretrained(folder)
        model = read_hf_model(Path(folder)).model
    if limit is not None:
        assert model.experts is not None
        experts = model.experts.model_copy(update={"swiglu_limit": limit})
        model = model.model_copy(update={"experts": experts})
    return model.model_copy(update={"vocab_divisor": 64, "init_std": 0.1}).model_dump()


def case(model: Mapping[str, Any], parallel: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What `train_curves` is asked for; tensor-parallel ranks of students with experts share out the sequence."""
    more = {"sequence_parallel": True} if model["experts"] and "tensor" in parallel else {}
    return {"model": dict(model), "parallel": {**parallel, **more}, "kd": True, "steps": steps}


def worst(curves: Mapping[str, list[float]], reference: Mapping[str, list[float]]) -> float:
    """The largest difference of the loss at any step."""
    both = zip(curves["loss"], reference["loss"], strict=True)
    return max(abs(one - other) for one, other in both)


def measure(name: str, layouts: Sequence[str], steps: int) -> dict[str, Any]:
    """Train a family's student under the layouts and in one process."""
    model = section(name)
    used = [layout for layout in layouts if layout != "EP2" or model["experts"]]
    reference = run_cases({"one": case(model, {}, steps)})["one"]
    differences = {}
    for layout in used:
        processes, parallel = LAYOUTS[layout]
        found = run_distributed(run_cases, processes, cases={layout: case(model, parallel, steps)})
        differences[layout] = worst(found[layout], reference)
    first, last = reference["loss"][0], reference["loss"][-1]
    return {"family": name, "first_loss": first, "last_loss": last, "differences": differences}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = [f"| family | loss | {' | '.join(LAYOUTS)} |", "|---|--:|" + "--:|" * len(LAYOUTS)]
    for row in rows:
        found = row["differences"]
        cells = [f"{found[name]:.1e}" if name in found else "" for name in LAYOUTS]
        fall = f"{row['first_loss']:.3f} to {row['last_loss']:.3f}"
        lines.append(f"| `{row['family']}` | {fall} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = command_line(__doc__, recipe=False)
    parser.add_argument("--only", action="append", choices=EVERY, help="these families alone")
    arguments = parser.parse_args()
    names = arguments.only or EVERY
    report: dict[str, Any] = {"environment": environment(*VERSIONS), "steps": STEPS}
    rows: list[Any] = []
    for name in names:
        rows.append(measure(name, [*LAYOUTS], STEPS))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    if arguments.only:
        rows += kept_rows(arguments.output, report, {"family": names}, VERSIONS)
    rows.sort(key=lambda row: EVERY.index(row["family"]))
    print(table(rows))
    write_json(arguments.output, {**report, "rows": rows})
    return 0


if __name__ == "__main__":
    run(main)
