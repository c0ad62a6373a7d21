"""Measures what opening a corpus of very many documents costs each process: seconds, and memory of its own and shared.

    python tools/bench_scale.py [--documents 10000000] [--processes 2 4] [--folder DIR] [--before CHECKOUT]
        [--sparse] [--output FILE.json] [--figures FILE.jsonl]

Writes a corpus of documents of 1 to 15 tokens whose .bin is a sparse file, lets one process find its fingerprint, as
the first rank of a job does, and starts so many processes at once. Each opens it, makes the sequence plan, and reads 64
sequences; when all have, memory is read from /proc/PID/smaps_rollup. The plan is removed before each row, so that it is
built; "again" is a second start, with the plan there. With --before another checkout of this repository is measured
too, on the same corpus. With --sparse the documents are empty but the last, and .idx is sparse too: for counts whose
tables are more than the disk is to hold. Prints Markdown; all memory in MB.

anonymous: memory that no other process shares and that the kernel cannot drop (smaps: Anonymous), beyond that of the
imports. peak: the most of it at any time, read every 50 ms. private, shared: resident pages that only this process, or
others too, have mapped; those of files are page cache. pss: a shared page counts for its share.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from reporting import append_line, command_line, environment, run, write_json

from distill_pretrain.corpus.index_tables import IDX_HEADER, IDX_MAGIC
from distill_pretrain.corpus.token_index import TokenIndex

HERE = Path(__file__).parents[1]
SEQ_LEN, SEED, CHUNK = 2048, 1234, 1 << 22
WORK = """
import hashlib, json, sys, threading, time
from pathlib import Path
import numpy as np
from distill_pretrain.corpus.sequence_plan import SequencePlan
from distill_pretrain.corpus.token_index import TokenIndex

def rollup():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) / 1000 for line in lines}

peak = 0.0
def watch():
    global peak
    while True:
        peak = max(peak, rollup()["Anonymous"])
        time.sleep(0.05)

start = rollup()["Anonymous"]
print("ready", flush=True)
sys.stdin.readline()
threading.Thread(target=watch, daemon=True).start()
began = time.time()
index = TokenIndex.open(Path(sys.argv[1]))
opened = time.time()
plan = SequencePlan(index, seq_len=int(sys.argv[2]), seed=int(sys.argv[3]))
planned = time.time()
numbers = np.linspace(0, plan.num_sequences - 1, 64).astype(np.int64)
digest = hashlib.sha256()
for array in plan.read(numbers):
    digest.update(array.tobytes())
for place in range(0, index.num_documents, max(1, index.num_documents // 1000)):
    digest.update(int(plan._order[place]).to_bytes(8, "little"))
print(json.dumps({"open_s": opened - began, "plan_s": planned - opened, "digest": digest.hexdigest()}), flush=True)
sys.stdin.readline()
found = rollup()
private = found["Private_Clean"] + found["Private_Dirty"]
shared = found["Shared_Clean"] + found["Shared_Dirty"]
memory = {"anonymous": found["Anonymous"] - start, "peak": peak - start, "private": private, "shared": shared}
print(json.dumps({**memory, "pss": found["Pss"]}), flush=True)
sys.stdin.readline()
"""


def write_corpus(folder: Path, num_documents: int, *, sparse: bool) -> Path:
    """A corpus with real tables and a sparse .bin, or sparse altogether; its prefix."""
    prefix = folder / "tokens"
    num_sequences = 1 if sparse else num_documents
    pointers, bounds = (IDX_HEADER.size + 4 * num_sequences, IDX_HEADER.size + 12 * num_sequences)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(IDX_HEADER.pack(IDX_MAGIC, 1, 8, num_sequences, num_documents + 1))
        if sparse:
            total = 1 << 20
            file.write(np.array([total], "<i4").tobytes())
            file.seek(bounds + 8 * num_documents)
            file.write(np.array([1], "<i8").tobytes())
        else:
            draw, total = np.random.default_rng(0), 0
            for first in range(0, num_documents, CHUNK):
                count = min(CHUNK, num_documents - first)
                lengths = draw.integers(1, 16, count)
                for at, width, values in (
                    (IDX_HEADER.size, 4, lengths),
                    (pointers, 8, (total + np.cumsum(lengths) - lengths) * 2),
                    (bounds, 8, np.arange(first, first + count)),
                ):
                    file.seek(at + width * first)
                    file.write(values.astype(f"<i{width}").tobytes())
                total += int(lengths.sum())
            file.write(np.array([num_documents], "<i8").tobytes())
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * total)
    return prefix


def measure(tree: Path, prefix: Path, count: int) -> dict[str, Any]:
    """So many processes of a checkout at once: the slowest's seconds, and MB of the one with the most."""
    settings = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORK, str(prefix), str(SEQ_LEN), str(SEED)]
    processes = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tree,
            env={**os.environ, **settings},
        )
        for _ in range(count)
    ]

    def answers() -> list[str]:
        lines = []
        for process in processes:
            assert process.stdout
            lines.append(process.stdout.readline())
            if not lines[-1]:
                raise SystemExit(f"a process of {tree} ended with {process.wait()}")
        return lines

    def go_on() -> None:
        for process in processes:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()

    try:
        answers()
        started = time.time()
        go_on()
        took = [json.loads(line) for line in answers()]
        wall = time.time() - started
        go_on()
        memory = [json.loads(line) for line in answers()]
        go_on()
    finally:
        for process in processes:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.kill()
            process.wait()
    (digest,) = {one["digest"] for one in took}
    figures = {key: max(one[key] for one in took) for key in ("open_s", "plan_s")}
    figures |= {f"{key}_mb": max(one[key] for one in memory) for key in memory[0]}
    figures["all_pss_mb"] = sum(one["pss"] for one in memory)
    return {
        "wall_s": round(wall, 2),
        **{k: round(v, 2) for k, v in figures.items()},
        "plan": digest,
    }


def main() -> None:
    """Measure, print, write."""
    parser = command_line(__doc__, recipe=False, figures=True)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write the corpus")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    parser.add_argument("--sparse", action="store_true")
    arguments = parser.parse_args()
    trees = {"after": HERE}
    if arguments.before:
        trees = {"before": arguments.before.resolve(), **trees}
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory(dir=arguments.folder) as folder:
        prefix = write_corpus(Path(folder), arguments.documents, sparse=arguments.sparse)
        size = os.stat(f"{prefix}.idx")
        started = time.time()
        index = TokenIndex.open(prefix)
        opened = time.time()
        assert index.fingerprint.num_documents == arguments.documents
        first = {"checked_s": opened - started, "fingerprint_s": time.time() - opened}
        del index
        for count in arguments.processes:
            for name, tree in trees.items():
                shutil.rmtree(f"{prefix}.plans", ignore_errors=True)
                for start in ("built", "again") if name == "after" else ("built",):
                    row = {"documents": arguments.documents, "processes": count, "tree": name}
                    rows.append({**row, "start": start, **measure(tree, prefix, count)})
                    append_line(arguments.figures, rows[-1])
    assert len({row.pop("plan") for row in rows}) == 1, "the plans differ"
    columns = ("processes", "tree", "start", "wall_s", "open_s", "plan_s", "anonymous_mb")
    columns += ("peak_mb", "private_mb", "shared_mb", "pss_mb", "all_pss_mb")
    print(
        f"{arguments.documents:,} documents, .idx of {size.st_size / 1e9:.2f} GB; once for all processes: tables "
        f"checked in {first['checked_s']:.1f} s, fingerprint found in {first['fingerprint_s']:.1f} s\n"
    )
    print("| " + " | ".join(columns) + " |")
    print("|--:|:--|:--|" + "--:|" * (len(columns) - 3))
    for row in rows:
        print("| " + " | ".join(str(row[column]) for column in columns) + " |")
    corpus = {"documents": arguments.documents, "sparse": arguments.sparse}
    corpus |= {key: round(seconds, 2) for key, seconds in first.items()}
    corpus |= {"idx_bytes": size.st_size, "idx_bytes_on_disk": size.st_blocks * 512}
    write_json(arguments.output, {**environment("numpy"), **corpus, "rows": rows})


if __name__ == "__main__":
    run(main)
