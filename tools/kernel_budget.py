"""What an NVIDIA card should need for the loss's kernels, by counting bytes and instructions.

A pass over the logits takes the longer of two times: that of moving its bytes, at the speed of a copy, and that of
issuing its instructions, 4 x 32 lanes per cycle and multiprocessor. Instructions per logit are those that
`compile_kernels.py --instructions` counted in the machine code.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

COUNTED = Path(__file__).parents[1] / "docs/results/kernels/instructions.json"
BEFORE = COUNTED.with_name("instructions_before.json")
"""Counted by the same tool at c89646a, where each vector was asked whether it lies at a row's end."""
LANES_PER_CYCLE = 4 * 32
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}

STAGES = {"row_statistics": 1, "gradient": 2, "fused": 2}
"""How often a stage moves the logits: read, or read and written."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What decides the time of a pass.

    Attributes:
        name: as torch gives it, or the beginning of that.
        architecture: whose machine code it runs.
        multiprocessors: of the whole card.
        clock_ghz: at which they run under load.
        gb_per_s: of a copy on the device, bytes read and written; nine tenths of what the memory's data sheet says.
    """

    name: str
    architecture: str
    multiprocessors: int
    clock_ghz: float
    gb_per_s: float

    @property
    def lanes_per_s(self) -> float:
        """Instructions of single lanes that it can issue in a second."""
        return self.multiprocessors * LANES_PER_CYCLE * self.clock_ghz * 1e9

    @classmethod
    def named(cls, name: str) -> Card | None:
        """The card of this name, if its figures are known."""
        return next((card for card in CARDS if name.startswith(card.name)), None)


CARDS = (
    Card(
        name="NVIDIA H100 80GB HBM3",
        architecture="sm_90",
        multiprocessors=132,
        clock_ghz=1.98,
        gb_per_s=3000,
    ),
    Card(
        name="NVIDIA H200",
        architecture="sm_90",
        multiprocessors=132,
        clock_ghz=1.98,
        gb_per_s=4300,
    ),
)


def free_instructions(stage: str, dtype: str, card: Card) -> float:
    """Instructions per logit that a pass can issue while its bytes move."""
    moved = STAGES[stage] * BYTES[dtype] / (card.gb_per_s * 1e9)
    return moved * card.lanes_per_s


@cache
def counted() -> dict[str, dict[str, float]]:
    """By architecture and kernel, instructions per logit; empty where nobody has counted."""
    if not COUNTED.is_file():
        return {}
    table: dict[str, dict[str, float]] = json.loads(COUNTED.read_text())["per_logit"]
    return table


def predicted_ms(
    stage: str, dtype: str, rows: int, columns: int, card: Card | None
) -> float | None:
    """Milliseconds of a stage over [rows, columns] of logits, general forms left out; None for what nobody counted."""
    if card is None:
        return None
    instructions = counted().get(card.architecture, {}).get(f"{stage}<{dtype}, false>")
    if instructions is None:
        return None
    logits = rows * columns
    moving = logits * STAGES[stage] * BYTES[dtype] / (card.gb_per_s * 1e9)
    issuing = logits * instructions / card.lanes_per_s
    return round(1e3 * max(moving, issuing), 4)


SHAPES = ((8192, 128_256), (4096, 151_936), (8192, 32_000))
HEAD = """# What the loss's kernels should take, written down before anyone measures

    python tools/compile_kernels.py --instructions --output docs/results/kernels/instructions.json
    python tools/kernel_budget.py --output docs/results/kernels/predictions.md

Counted in the machine code for sm_90 (NVRTC {nvrtc}). No GPU was at hand: **nothing here is measured**.
`tools/gpu_day/call_1.sh` measures the same shapes and puts these figures beside.

A pass over the logits takes the longer of two times. Its bytes move at the speed of a copy: nine tenths of the data
sheet's, 4.3 TB/s of 4.8 on an H200 and 3.0 of 3.35 on an H100; `row_statistics` reads a logit, `gradient` and `fused`
read and write it. Its instructions are issued at 4 x 32 lanes per cycle and multiprocessor: 132 x 128 x 1.98 GHz are
33 T lanes/s on either card. On top come latencies that too few warps hide, `combine`, the entries of the targets (50 to
a row, against 128,256 logits) and launches. A kernel that needs nearly all of its slots will not reach the copy's
speed: above {edge:.0%} it is marked, and should be slower than said.

*Before* is commit c89646a. Since then whole tiles of vectors are asked once whether a row ends in them, a logit's
exponent is one multiply-add (what rounding the shift leaves out is put back once per row), maxima are taken of two bf16
values at a time, and a thread of `fused` keeps 8 vectors of 512 threads instead of 4 of 1,024, so that on sm_90 a
multiprocessor holds two blocks of its plain form: one moves its row while the other waits for its cluster.
"""
EDGE = 0.7


def slots(stage: str, dtype: str, card: Card) -> float | None:
    """Which part of the issue slots a kernel needs at the copy's speed; None for what nobody counted."""
    instructions = counted().get(card.architecture, {}).get(f"{stage}<{dtype}, false>")
    return None if instructions is None else instructions / free_instructions(stage, dtype, card)


def predictions() -> str:
    """Tables of slots and milliseconds."""
    nvrtc = json.loads(COUNTED.read_text())["nvrtc"]
    lines = [HEAD.format(nvrtc=nvrtc, edge=EDGE), "## Instructions per logit\n"]
    lines += [
        "| kernel | before | counted | free on an H200 | slots taken | free on an H100 | slots taken |"
    ]
    lines += ["|:--|--:|--:|--:|--:|--:|--:|"]
    before = json.loads(BEFORE.read_text())["per_logit"]
    h100, h200 = CARDS
    for stage in STAGES:
        for dtype in ("bf16", "fp32"):
            kernel = f"{stage}<{dtype}, false>"
            found, was = (table[h200.architecture][kernel] for table in (counted(), before))
            cells = [
                f"{free_instructions(stage, dtype, card):.1f} | {_share(stage, dtype, card)}"
                for card in (h200, h100)
            ]
            lines.append(f"| `{stage}`, {dtype} | {was:.1f} | {found:.1f} | {' | '.join(cells)} |")
    lines += ["", "## Milliseconds\n", "| kernel | logits | H200 | H100 |", "|:--|:--|--:|--:|"]
    for rows, columns in SHAPES:
        for stage in STAGES:
            for dtype in ("bf16", "fp32"):
                times = [predicted_ms(stage, dtype, rows, columns, card) for card in (h200, h100)]
                shape = f"{rows:,} x {columns:,}, {dtype}"
                lines.append(f"| `{stage}` | {shape} | {times[0]:.3f} | {times[1]:.3f} |")
    return "\n".join(lines) + "\n"


def _share(stage: str, dtype: str, card: Card) -> str:
    taken = slots(stage, dtype, card)
    assert taken is not None
    return f"{taken:.0%}" + (" (!)" if taken > EDGE else "")


def main() -> None:
    """Print the predictions, or write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, metavar="FILE.md")
    output = parser.parse_args().output
    if output:
        output.write_text(predictions(), encoding="utf-8")
    else:
        print(predictions())


if __name__ == "__main__":
    main()
