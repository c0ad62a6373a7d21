"""Instructions on the main path of a kernel, counted in what nvdisasm prints of its machine code.

The main path of a kernel that streams over its input is one turn of the loop with the most 16-byte accesses of global
memory: of the ways through it, the shortest among those with all these accesses and an exponential for every value.
The ways that are left out are those of rows' ends and of a new maximum. A predicated instruction counts: its slot is
taken. Of a kernel without such a loop the path is the whole kernel, with every loop in it run once.
"""

from __future__ import annotations

import re
import shutil
import site
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

LABEL = re.compile(r"^(\.\S+):")
FUNCTION = re.compile(r"^\.text\.(\S+):")
INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<name>[A-Z][A-Z0-9_.a-z]*)(?P<rest>[^;]*);"
)
TARGET = re.compile(r"`\((\.\S+?)\)")
VECTOR_BYTES = 16
Ways = dict[tuple[int, int], tuple[int, int]]
"""By 16-byte accesses and exponentials: instructions, and those among them that access the stack."""


class DisassemblerMissing(Exception):
    """There is no nvdisasm."""


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One machine instruction.

    Attributes:
        name: with its modifiers, such as LDG.E.128.
        target: label that a branch goes to.
        is_conditional: whether it is predicated.
    """

    name: str
    target: str | None
    is_conditional: bool

    @property
    def is_vector_access(self) -> bool:
        """A load or store of 16 bytes of global memory."""
        return self.name.startswith(("LDG", "STG")) and ".128" in self.name

    @property
    def is_load(self) -> bool:
        """A load of 16 bytes of global memory."""
        return self.is_vector_access and self.name.startswith("LDG")

    @property
    def is_exponential(self) -> bool:
        """Of one value, or of two that are packed."""
        return self.name.startswith("MUFU.EX2")

    @property
    def is_local(self) -> bool:
        """An access of the stack, which lies in local memory."""
        return self.name.startswith(("LDL", "STL"))


@dataclass(frozen=True, kw_only=True)
class Code:
    """A kernel: its instructions, and the index that each label stands at."""

    instructions: Sequence[Instruction]
    labels: dict[str, int]

    def successors(self, index: int) -> Iterator[int]:
        """What may run after an instruction."""
        instruction = self.instructions[index]
        opcode = instruction.name.partition(".")[0]
        if opcode == "BRA" and ".DIV" not in instruction.name:
            if instruction.target is not None:
                yield self.labels[instruction.target]
            if not instruction.is_conditional:
                return
        elif opcode in ("EXIT", "RET") and not instruction.is_conditional:
            return
        if index + 1 < len(self.instructions):
            yield index + 1


@dataclass(frozen=True, kw_only=True)
class MainPath:
    """A main path.

    Attributes:
        instructions: on it.
        accesses: of 16 bytes of global memory.
        local: accesses of the stack.
        is_loop: whether it is a turn of a loop.
    """

    instructions: int
    accesses: int
    local: int
    is_loop: bool


def read_code(text: str) -> dict[str, Code]:
    """The kernels in the output of `nvdisasm -c`, by their names in the image."""
    found: dict[str, Code] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if function := FUNCTION.match(line):
            instructions, labels = [], {}
            found[function[1]] = Code(instructions=instructions, labels=labels)
        elif label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := INSTRUCTION.search(line):
            target = TARGET.search(match["rest"])
            instructions.append(
                Instruction(
                    name=match["name"],
                    target=target[1] if target else None,
                    is_conditional=match["predicate"] is not None or ".U" in match["name"],
                )
            )
    return found


def loops(code: Code) -> list[tuple[int, int]]:
    """First and last instruction of every loop: the targets of backward branches, and the branches."""
    found = []
    for index, instruction in enumerate(code.instructions):
        start = code.labels.get(instruction.target or "", index + 1)
        if instruction.name.startswith("BRA") and start <= index:
            found.append((start, index))
    return found


def main_path(code: Code, value_bytes: int, *, in_loop: bool) -> MainPath:
    """The main path of a kernel over values of so many bytes.

    Args:
        code: the kernel.
        value_bytes: of a logit.
        in_loop: whether the kernel streams in a loop; else the path is that of the whole kernel.

    Raises:
        ValueError: there is no such loop, or no way through it.
    """
    start, end = 0, len(code.instructions) - 1
    if in_loop:
        every = [(_accesses(code, *loop), loop[0] - loop[1], loop) for loop in loops(code)]
        if not every or max(every)[0] == 0:
            raise ValueError("no loop has 16-byte accesses of global memory")
        start, end = max(every)[2]
    part = code.instructions[start : end + 1]
    values = sum(i.is_load for i in part) * VECTOR_BYTES // value_bytes
    ways = _ways(code, start, end if in_loop else None, values)
    if not ways:
        raise ValueError("no way leads through the kernel's main loop")
    most = max(accesses for accesses, _ in ways)
    # Where exponentials of two values are packed, half as many are all.
    for wanted in (values, values // 2, 0):
        enough = [way for (a, e), way in ways.items() if a == most and e >= wanted]
        if enough:
            break
    count, local = min(enough)
    return MainPath(instructions=count, accesses=most, local=local, is_loop=in_loop)


def _accesses(code: Code, start: int, end: int) -> int:
    return sum(i.is_vector_access for i in code.instructions[start : end + 1])


def _ways(code: Code, start: int, end: int | None, most_exponentials: int) -> Ways:
    """The shortest ways from `start` to `end`, or to where a kernel exits, without turning back."""
    at: dict[int, Ways] = {start: {(0, 0): (0, 0)}}
    arrived: Ways = {}
    for index in range(start, len(code.instructions) if end is None else end + 1):
        instruction = code.instructions[index]
        reached: Ways = {}
        for (accesses, exponentials), (count, local) in at.pop(index, {}).items():
            key = (
                accesses + instruction.is_vector_access,
                min(exponentials + instruction.is_exponential, most_exponentials),
            )
            _keep_shortest(reached, {key: (count + 1, local + instruction.is_local)})
        is_end = index == end if end is not None else instruction.name == "EXIT"
        if is_end:
            _keep_shortest(arrived, reached)
        if index == end or (is_end and not instruction.is_conditional):
            continue
        for following in code.successors(index):
            if following > index and (end is None or following <= end):
                _keep_shortest(at.setdefault(following, {}), reached)
    return arrived


def _keep_shortest(known: Ways, more: Ways) -> None:
    for key, way in more.items():
        known[key] = min(way, known.get(key, way))


def disassembled(image: bytes) -> str:
    """What nvdisasm prints of a cubin.

    Raises:
        DisassemblerMissing: it is not installed.
        subprocess.CalledProcessError: it refuses the cubin.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(image)
        command = [find_disassembler(), "-c", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def find_disassembler() -> str:
    """The nvdisasm of PATH, of its wheel, or the one that comes with Triton.

    Raises:
        DisassemblerMissing: none is there.
    """
    if found := shutil.which("nvdisasm"):
        return found
    for folder in {sysconfig.get_path("purelib"), *site.getsitepackages()}:
        for pattern in ("nvidia/*/bin/nvdisasm", "triton/backends/nvidia/bin/nvdisasm"):
            for path in Path(folder).glob(pattern):
                return str(path)
    raise DisassemblerMissing("no nvdisasm: pip install nvidia-cuda-nvdisasm")
