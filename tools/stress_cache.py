"""Long fault tests of the sparse-logit cache: killed writers, races, flipped bits, hostile files, full disks.

    python tools/stress_cache.py [--which kill,race,bits,truncate,misalign,fuzz,diskfull]
                                 [--codec raw|hc] [--sampler systematic|multinomial|topk] [--output FILE.json]

Works on small caches that it makes itself from synthetic, Zipf-like targets; the defaults take some minutes. Prints one
line per test and ends with status 1 if a promise of FORMAT.md was broken. Linux only (fork, /proc).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from reporting import command_line, environment, write_json
from stress import hostile, readers, samples, writers


def summary(name: str, result: dict[str, Any]) -> str:
    """One line; details stay in the JSON."""
    shown = [
        f"{key.replace('_', ' ')} {value}"
        for key, value in result.items()
        if key not in ("passed", "seconds", "by_file", "messages") and value not in ([], {})
    ]
    state = "passed" if result["passed"] else "FAILED"
    return f"{name}: {state} in {result['seconds']} s; " + ", ".join(shown)


def main() -> int:
    """Run the tests, print a line each, write JSON."""
    parser = command_line(__doc__, recipe=False)
    parser.add_argument("--which", default="kill,race,bits,truncate,misalign,fuzz,diskfull")
    parser.add_argument("--codec", choices=("raw", "hc"), default="raw")
    parser.add_argument(
        "--sampler", choices=("systematic", "multinomial", "topk"), default="systematic"
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--race-rounds", type=int, default=30)
    parser.add_argument("--fuzz-files", type=int, default=100_000)
    parser.add_argument("--diskfull-sizes", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    large = samples.writers_sample(args.codec, args.sampler)
    small = samples.readers_sample(args.codec, args.sampler)
    tests: dict[str, Callable[[], dict[str, Any]]] = {
        "kill": lambda: writers.kill(large, kills=args.kills, seed=args.seed),
        "race": lambda: writers.race(large, rounds=args.race_rounds),
        "bits": lambda: readers.bits(small),
        "truncate": lambda: readers.truncate(small),
        "misalign": lambda: readers.misalign(small),
        "fuzz": lambda: hostile.fuzz(small, files=args.fuzz_files, seed=args.seed),
        "diskfull": lambda: writers.diskfull(large, sizes=args.diskfull_sizes),
    }
    wanted = args.which.split(",")
    if unknown := set(wanted) - set(tests):
        parser.error(f"unknown tests {sorted(unknown)}; there are {', '.join(tests)}")
    results = {}
    for name in wanted:
        start = time.perf_counter()
        result = tests[name]()
        results[name] = {**result, "seconds": round(time.perf_counter() - start, 1)}
        print(summary(name, results[name]), flush=True)
        for case, message in result.get("messages", {}).items():
            print(f"  {case}: {message}")
    report = {
        **environment("numpy"),
        "codec": args.codec,
        "sampler": args.sampler,
        "seed": args.seed,
        "plans": {"writers": asdict(large.plan), "readers": asdict(small.plan)},
        "tests": results,
    }
    write_json(args.output, report)
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
