"""Times `tokenize` on one corpus beside datatrove's tokenizer, with one process each, and compares their tokens.

    python tools/bench_tokenize.py CORPUS --tokenizer FOLDER --end-of-document TOKEN --peer PYTHON \
        [--rounds 1] [--together] [--peer-batch 10000]

PYTHON is the interpreter of an environment that has `datatrove[io,processing]`. Both read the same file with the same
tokenizer, by turns or --together on a core each, and end each document with the same token; datatrove leaves documents
in the file's order. CPU seconds are user and system time; memory is the most that a program and its children held at
once (proportional set size, looked at twice a second). Prints Markdown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from reporting import command_line, environment, write_json

from distill_pretrain.corpus.token_index import TokenIndex

PEER = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

folder, name, tokenizer, end, batch, output = sys.argv[1:]
steps = [
    JsonlReader(folder, glob_pattern=name),
    DocumentTokenizer(
        output + "/tokens", tokenizer, eos_token=end, batch_size=int(batch), shuffle_documents=False
    ),
]
LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=output + "/logs").run()
"""


@dataclass(frozen=True, kw_only=True)
class Took:
    """What a program took: seconds of processors and of the clock, and MiB at the most."""

    cpu: float
    wall: float
    memory: float


def _descendants(pid: int) -> Iterator[int]:
    """A process and what it started, as they are now."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from _descendants(int(child))


def _held(pid: int) -> float:
    """MiB that a process and its descendants hold; what two of them share counts once."""
    kilobytes = 0
    try:
        for one in _descendants(pid):
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except (OSError, ValueError):
        pass  # one of them ended while it was looked at
    return kilobytes / 1024


def run(command: list[str]) -> Took:
    """A program to its end.

    Raises:
        SystemExit: it failed; what it printed is said.
    """
    settings = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    started, memory = time.perf_counter(), 0.0
    with TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**os.environ, **settings}
            )
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            memory = max(memory, _held(process.pid))
            time.sleep(0.5)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{command} failed:\n{log.read_text(errors='replace')[-4000:]}")
    return Took(
        cpu=usage.ru_utime + usage.ru_stime, wall=time.perf_counter() - started, memory=memory
    )


def ours(corpus: Path, tokenizer: Path, end: str, output: Path) -> Took:
    """Run `tokenize`."""
    settings = {
        "corpus.paths": f"[{corpus}]",
        "corpus.workers": 1,
        "corpus.held_out_fraction": 0,
        "corpus.output_dir": output,
        "tokenizer.kind": "hf",
        "tokenizer.path": tokenizer,
        "tokenizer.end_of_document": f"'{end}'",
        "tokenizer.bos": "never",
    }
    arguments = [f"{key}={value}" for key, value in settings.items()]
    return run([sys.executable, "-m", "distill_pretrain", "tokenize", *arguments])


def theirs(peer: str, batch: int, corpus: Path, tokenizer: Path, end: str, output: Path) -> Took:
    """Run datatrove's pipeline of a reader and its tokenizer."""
    file = str(tokenizer / "tokenizer.json")
    given = str(corpus.parent), corpus.name, file, end, str(batch), str(output)
    return run([peer, "-c", PEER, *given])


def compare(our_folder: Path, their_folder: Path) -> dict[str, int]:
    """How many documents there are, how many tokens, and how many documents have other tokens."""
    index = TokenIndex.open(our_folder / "train")
    (path,) = (their_folder / "tokens").glob("*.ds")
    ends = np.fromfile(f"{path}.index", np.uint64).astype(np.int64)
    stream = np.memmap(path, np.uint16 if path.stat().st_size == 2 * ends[-1] else np.uint32, "r")
    if len(ends) != index.num_documents:
        raise SystemExit(f"documents: {index.num_documents} of ours, {len(ends)} of datatrove's")
    starts, other = np.concatenate([[0], ends[:-1]]), 0
    for document, (start, end) in enumerate(zip(starts, ends, strict=True)):
        length = int(index.document_lengths[document])
        same = length == end - start
        other += not (same and np.array_equal(index.read(document, 0, length), stream[start:end]))
    return {"documents": len(ends), "tokens": index.num_tokens, "other_documents": other}


def main() -> None:
    """Measure, compare, print, write."""
    parser = command_line(__doc__, recipe=False)
    parser.add_argument("corpus", type=Path, metavar="CORPUS")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--end-of-document", required=True, metavar="TOKEN")
    parser.add_argument("--peer", required=True, metavar="PYTHON")
    parser.add_argument(
        "--peer-batch", type=int, default=10_000, help="documents that datatrove holds"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--together", action="store_true", help="both at once, on a core each")
    asked = parser.parse_args()
    took: dict[str, list[Took]] = {"tokenize": [], "datatrove": []}
    for number in range(asked.rounds):
        with TemporaryDirectory(dir=asked.corpus.parent) as folder:
            outputs = Path(folder, "ours"), Path(folder, "theirs")
            given = asked.corpus.resolve(), asked.tokenizer.resolve(), asked.end_of_document
            programs = {
                "tokenize": partial(ours, *given, outputs[0]),
                "datatrove": partial(theirs, asked.peer, asked.peer_batch, *given, outputs[1]),
            }
            with ThreadPoolExecutor(2 if asked.together else 1) as pool:
                turns = {name: pool.submit(program) for name, program in programs.items()}
            for name, turn in turns.items():
                took[name].append(turn.result())
            if number == 0:
                tokens = compare(*outputs)
        for name, done in took.items():
            print(json.dumps({"round": number, "program": name, **asdict(done[-1])}), flush=True)
    print("| | CPU seconds | seconds on the clock | MiB at the most |\n|:--|--:|--:|--:|")
    for name, done in took.items():
        middle = sorted(done, key=lambda turn: turn.cpu)[len(done) // 2]
        print(f"| {name} | {middle.cpu:.1f} | {middle.wall:.0f} | {middle.memory:.0f} |")
    print(f"\n{tokens}")
    versions = {"peer": _peer_versions(asked.peer), **environment("tokenizers", "transformers")}
    all_of = {name: [asdict(turn) for turn in done] for name, done in took.items()}
    write_json(asked.output, {**versions, "turns": all_of, "tokens": tokens})


def _peer_versions(peer: str) -> dict[str, str]:
    """Versions of what the other environment runs."""
    program = (
        "import json; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in ('datatrove', 'tokenizers')}))"
    )
    printed = subprocess.run([peer, "-c", program], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(printed.stdout)
    return found


if __name__ == "__main__":
    main()
