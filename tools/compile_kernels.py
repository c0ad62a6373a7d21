"""Compile every CUDA kernel for every architecture and show registers and spills; no GPU is needed.

    python tools/compile_kernels.py [--architectures sm_90 ...] [--only bf16] [--output FILE]
    python tools/compile_kernels.py --instructions [--output docs/results/kernels/instructions.json]

Compiles with NVRTC, as users do (`pip install nvidia-cuda-nvrtc`). Ends with status 1 if a kernel spills more than
32 bytes of registers or does not compile. With --instructions it counts instead what the loss's kernels issue per logit
on their main path, in the machine code for sm_90 and sm_100 (`pip install nvidia-cuda-nvdisasm`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from distill_pretrain.kernels.cuda import nvrtc
from distill_pretrain.kernels.cuda.backend import OPTIONS
from distill_pretrain.kernels.cuda.launcher import KernelSource
from distill_pretrain.kernels.sparse_kd.launch import CAPPED
from distill_pretrain.kernels.sparse_kd.launch import SOURCE as SPARSE_KD
from distill_pretrain.kernels.teacher_sampling import SOURCE as TEACHER_SAMPLING
from tools.kernel_budget import BYTES, STAGES
from tools.sass import DisassemblerMissing, MainPath, disassembled, main_path, read_code

SOURCES = (SPARSE_KD, CAPPED, TEACHER_SAMPLING)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
COUNTED_ARCHITECTURES = ("sm_90", "sm_100")
MOST_SPILLED_BYTES = 32

HEAD = """\
# Registers of the CUDA kernels

`python tools/compile_kernels.py`, every kernel for every architecture. Not yet run on hardware.

"""

USAGE = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a kernel needs on an architecture; stack and spills in bytes per thread."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    spilled: int


def compiled(source: KernelSource, architecture: str) -> Iterator[Usage]:
    """Compile all kernels of a source.

    Raises:
        nvrtc.NvrtcMissing: there is no compiler.
        nvrtc.CompileFailed: with its log.
    """
    options = (f"--gpu-architecture={architecture}", *OPTIONS, "--ptxas-options=-v")
    image = nvrtc.load().compile(source.text(), source.headers(), source.kernels, options)
    found = {match["name"]: match for match in USAGE.finditer(image.log)}
    for kernel in source.kernels:
        match = found[image.names[kernel]]
        yield Usage(
            kernel=kernel,
            architecture=architecture,
            registers=int(match["registers"]),
            stack=int(match["stack"]),
            spilled=max(int(match["stores"]), int(match["loads"])),
        )


def main_paths(
    architecture: str, dtypes: Sequence[str] = tuple(BYTES), source: KernelSource = SPARSE_KD
) -> dict[str, MainPath]:
    """The main paths of the loss's kernels over logits, by their names without the namespace.

    Args:
        architecture: such as sm_90.
        dtypes: of the logits.
        source: the kernels, or those of capped logits.

    Raises:
        DisassemblerMissing: there is no nvdisasm.
        nvrtc.NvrtcMissing: there is no compiler.
    """
    found = {}
    stages = re.compile(rf"sparse_kd::(({'|'.join(STAGES)})<({'|'.join(dtypes)}), [\w, ]+>)")
    wanted = {name: match for name in source.kernels if (match := stages.fullmatch(name))}
    options = (f"--gpu-architecture={architecture}", *OPTIONS)
    source = replace(source, kernels=tuple(wanted))
    image = nvrtc.load().compile(source.text(), source.headers(), source.kernels, options)
    codes = read_code(disassembled(image.data))
    for name, match in wanted.items():
        code, size = codes[image.names[name]], BYTES[match[3]]
        # The fused kernel holds a row in registers: it has no loop over logits.
        found[match[1]] = main_path(code, size, in_loop=match[2] != "fused")
    return found


def per_logit(kernel: str, path: MainPath) -> float:
    """Instructions that a logit costs."""
    stage, _, arguments = kernel.partition("<")
    logits = path.accesses / STAGES[stage] * 16 / BYTES[arguments.partition(",")[0]]
    return round(path.instructions / logits, 2)


def count_instructions(architectures: Sequence[str], output: Path | None) -> None:
    """Print the table, and write it as JSON."""
    paths = {
        architecture: main_paths(architecture) | main_paths(architecture, source=CAPPED)
        for architecture in architectures
    }
    table = {
        architecture: {kernel: per_logit(kernel, path) for kernel, path in found.items()}
        for architecture, found in paths.items()
    }
    print(f"| kernel | {' | '.join(table)} |\n|---|{'---|' * len(table)}")
    for kernel in next(iter(table.values())):
        cells = [
            f"{table[architecture][kernel]:.1f}"
            + (f", {found[kernel].local} stack accesses" if found[kernel].local else "")
            for architecture, found in paths.items()
        ]
        print(f"| `{kernel}` | {' | '.join(cells)} |")
    if output:
        major, minor = nvrtc.load().version
        report = {"nvrtc": f"{major}.{minor}", "per_logit": table}
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def restricted(source: KernelSource, text: str) -> KernelSource:
    """Only the kernels whose name contains `text`, and those that are no templates."""
    kernels = tuple(kernel for kernel in source.kernels if text in kernel or "<" not in kernel)
    return replace(source, kernels=kernels)


def table(usages: Sequence[Usage]) -> str:
    """Registers of each kernel by architecture, and what it spills."""
    architectures = list(dict.fromkeys(usage.architecture for usage in usages))
    by_kernel: dict[str, dict[str, Usage]] = {}
    for usage in usages:
        by_kernel.setdefault(usage.kernel, {})[usage.architecture] = usage
    lines = [
        f"| kernel | {' | '.join(architectures)} |",
        f"|---|{'---|' * len(architectures)}",
    ]
    for kernel, by_architecture in by_kernel.items():
        cells = [cell(by_architecture[architecture]) for architecture in architectures]
        lines.append(f"| `{kernel}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(usage: Usage) -> str:
    text = f"{usage.registers}"
    if usage.spilled:
        text += f", {usage.spilled} B spilled"
    elif usage.stack:
        text += f", {usage.stack} B stack"
    return text


def spilling(usages: Sequence[Usage]) -> list[Usage]:
    return [usage for usage in usages if usage.spilled > MOST_SPILLED_BYTES]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+")
    parser.add_argument("--only", default="", help="only templates whose arguments contain this")
    parser.add_argument("--instructions", action="store_true", help="count what a logit costs")
    parser.add_argument("--output", type=Path, help="write the table here")
    options = parser.parse_args(arguments)
    try:
        if options.instructions:
            count_instructions(options.architectures or COUNTED_ARCHITECTURES, options.output)
            return 0
        usages = [
            usage
            for source in SOURCES
            for architecture in options.architectures or ARCHITECTURES
            for usage in compiled(restricted(source, options.only), architecture)
        ]
    except (nvrtc.NvrtcMissing, nvrtc.CompileFailed, DisassemblerMissing) as error:
        print(error, file=sys.stderr)
        return 1
    major, minor = nvrtc.load().version
    text = f"Registers per thread, NVRTC {major}.{minor}.\n\n{table(usages)}"
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(HEAD + text, encoding="utf-8")
    too_many = spilling(usages)
    for usage in too_many:
        print(
            f"{usage.kernel} spills {usage.spilled} bytes on {usage.architecture}", file=sys.stderr
        )
    return int(bool(too_many))


if __name__ == "__main__":
    sys.exit(main())
